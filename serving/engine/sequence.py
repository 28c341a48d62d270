"""A request in the engine: its tokens so far, its rank, and how much of it is in the cache."""

import dataclasses
import itertools
from collections.abc import Iterable

from planner.inputs.layer_states import STATE_COPIES
from serving.engine.page_pool import PageKey
from serving.engine.snapshots import SnapshotWrite
from serving.engine.speculation import NOTHING_DRAFTED, Draft, Drafting
from serving.protocol.request import Request, RequestPhase


@dataclasses.dataclass(frozen=True, slots=True)
class RecoverableKV:
    """KV entries of a request that replicas hold for another rank to restore: positions 0 .. count - 1, in `pages` of
    the KV replicas with these numbers (serving/recovery/kv_replicas.py), one for each tp shard. `page_keys`: keys of
    the full pages. Without `sent` their rank was lost; with it, it lives, and the request goes on in another pool."""

    replicas: tuple[int, ...]
    pages: tuple[int, ...]
    count: int
    page_keys: tuple[PageKey, ...] | None = ()
    sent: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class InFlightStep:
    """The part of a step in flight for one request: it computes positions from `start` on, may sample a token, and
    may be the last step that the request needs. `draft` guesses that token and those after it. The step reads the state
    at the place `snapshot`, if that is set, and takes `snapshots`."""

    step: int
    start: int
    samples: bool
    last: bool
    draft: Draft | None = None
    snapshot: int | None = None
    snapshots: tuple[SnapshotWrite, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Sequence:
    """A request and its state. Preemption keeps the fields above `rank`, `recoverable` and `drafting`.

    `arrival` orders requests for their whole life. Once the steps in `in_flight` are done, the cache of `rank` holds
    the keys and values of positions 0 .. computed - 1, in `pages`; those below `committed` are there already. The last
    generated token is never in the cache: the next step computes its keys and values. `page_keys` are the keys of the
    full pages, None when other requests must not share them. `cached_tokens` counts the prompt tokens that the prefix
    cache held when the request was first given a rank, `scored` those whose log-probabilities were sent. A sequence
    with a rank and `recoverable` is being restored: a replica gives positions below `recoverable.count` before the
    first step.

    With a model whose requests have states, `slot` is the request's place among those of its rank, and `turns` counts
    the steps there that it was in, those in flight too: each reads one state of the slot and writes the next. The next
    step reads the state at the place `snapshot` instead, if that is set: the request begins from it, or the step before
    has written it. `answer_snapshot` is the key of the last snapshot behind the prompt. Up to `branch` the cache had
    its pages when it got its rank; a snapshot is wanted there.
    """

    request: Request
    arrival: int
    generated: tuple[int, ...] = ()
    cached_tokens: int | None = None
    scored: int = 0
    rank: int | None = None
    computed: int = 0
    pages: tuple[int, ...] = ()
    page_keys: tuple[PageKey, ...] | None = ()
    recoverable: RecoverableKV | None = None
    in_flight: tuple[InFlightStep, ...] = ()
    drafting: Drafting = NOTHING_DRAFTED
    slot: int | None = None
    turns: int = 0
    snapshot: int | None = None
    answer_snapshot: PageKey | None = None
    branch: int = 0

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def started(self) -> bool:
        """Whether the request was given a rank before."""
        return self.cached_tokens is not None

    @property
    def restoring(self) -> bool:
        """Whether the sequence has a rank and waits for its KV to be restored."""
        return self.rank is not None and self.recoverable is not None

    @property
    def committed(self) -> int:
        """Number of leading positions that are in the cache whatever happens to the steps in flight."""
        return self.in_flight[0].start if self.in_flight else self.computed

    @property
    def known_tokens(self) -> int:
        """Number of generated tokens whose ids are known."""
        return len(self.generated) - sum(each.samples for each in self.in_flight)

    @property
    def speculating(self) -> bool:
        """Whether a step in flight has rows of drafts, so that the number of its tokens is not known."""
        return any(each.draft is not None and each.draft.taken for each in self.in_flight)

    @property
    def ending(self) -> bool:
        """Whether a step in flight is the last one."""
        return any(each.last for each in self.in_flight)

    def without_in_flight(self) -> "Sequence":
        """The sequence as it is when the steps in flight are dropped."""
        if not self.in_flight:
            return self
        return dataclasses.replace(
            self,
            generated=self.generated[: self.known_tokens],
            computed=self.committed,
            in_flight=(),
            turns=self.turns - len(self.in_flight),
            snapshot=self.in_flight[0].snapshot,
        )

    @property
    def length(self) -> int:
        """Number of tokens: prompt and generated."""
        return len(self.request.prompt) + len(self.generated)

    @property
    def pending(self) -> int:
        """Number of tokens that are not in the cache. One token needs just a decode row."""
        return self.length - self.computed

    @property
    def unscored(self) -> int:
        """Number of prompt tokens still to be scored."""
        return 0 if self.request.sampling.prompt_logprobs is None else len(self.request.prompt) - 1 - self.scored

    @property
    def phase(self) -> RequestPhase:
        if self.rank is None:
            return RequestPhase.WAITING
        return RequestPhase.DECODE if self.pending == 1 and not self.restoring else RequestPhase.PREFILL

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """The tokens at positions start .. stop - 1 of prompt + generated."""
        prompt = self.request.prompt
        if start >= len(prompt):
            return self.generated[start - len(prompt) : stop - len(prompt)]
        if stop <= len(prompt):
            return prompt[start:stop]
        return prompt[start:] + self.generated[: stop - len(prompt)]

    @property
    def states(self) -> tuple[int, int] | None:
        """The places of the states that its next step reads and writes; None when requests have none."""
        if self.slot is None:
            return None
        first = self.slot * STATE_COPIES
        own = first + self.turns % STATE_COPIES
        return own if self.snapshot is None else self.snapshot, first + (self.turns + 1) % STATE_COPIES

    @property
    def held_places(self) -> set[int]:
        """The places of snapshots that its next step and those in flight read and write."""
        read = (self.snapshot, *(each.snapshot for each in self.in_flight))
        written = (write.place for each in self.in_flight for write in each.snapshots)
        return {place for place in (*read, *written) if place is not None}

    def placed_on(
        self,
        rank: int,
        pages: tuple[int, ...],
        *,
        computed: int = 0,
        page_keys: tuple[PageKey, ...] | None = (),
        slot: int | None = None,
        snapshot: int | None = None,
        branch: int = 0,
    ) -> "Sequence":
        """The sequence on a rank whose cache has its first `computed` positions, in full pages, and where its states
        are in `slot`. The state after these positions is at the place `snapshot`."""
        reused = computed if self.cached_tokens is None else self.cached_tokens
        return dataclasses.replace(
            self,
            rank=rank,
            cached_tokens=reused,
            computed=computed,
            pages=pages,
            page_keys=page_keys,
            slot=slot,
            snapshot=snapshot,
            branch=branch,
        )

    def preempted(self) -> "Sequence":
        """The sequence without a rank: prompt + generated tokens, to be computed again unless they are restored."""
        return dataclasses.replace(
            self.without_in_flight(),
            rank=None,
            computed=0,
            pages=(),
            page_keys=(),
            slot=None,
            turns=0,
            snapshot=None,
            answer_snapshot=None,
            branch=0,
        )

    def restarted(self) -> "Sequence":
        """The sequence without a rank and without recoverable KV."""
        return dataclasses.replace(self.preempted(), recoverable=None)


def free_slot(sequences: Iterable[Sequence], *, states: bool) -> int | None:
    """The lowest slot of states that none of the sequences of a rank has; None when requests have no `states`."""
    if not states:
        return None
    taken = {sequence.slot for sequence in sequences}
    return next(slot for slot in itertools.count() if slot not in taken)
