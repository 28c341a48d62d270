"""The state of the engine: every open request, and the pages of every rank. Values.

A transition takes a state and returns its successor, with outputs for clients where there are any:

| transition | module of `serving.engine` |
|---|---|
| a request arrives, is cancelled, passes its deadline | `lifecycle` |
| a step is scheduled; its results come in | `scheduler`; `step_results` |
| ranks are lost; a plan is adopted | `rank_changes` |
| a rank is to leave: its requests move | `migration` |
| KV entries of a lost rank are restored | `kv_restore` |
| requests go on in another pool | `hand_over` |
| ranks with other code are tried | `canaries` |

`schedule` makes a step and `apply` takes its results in. Another step may be scheduled before that, from the state as
it will be, in which the tokens of the step in flight are placeholders. A step that fails leaves no trace: continue from
the state that the last `schedule` returned, and let `lose` make the next. Do not go back to a state before it: a rank
may have written on pages that `schedule` took from the prefix cache.
"""

import dataclasses
from collections.abc import Iterable, Mapping

from serving.engine.fairness import TokenCounters
from serving.engine.limits import Limits
from serving.engine.page_pool import PageKey, PagePool, hash_pages
from serving.engine.poison import Suspicion
from serving.engine.sequence import Sequence
from serving.engine.speculation import NOTHING_DRAFTED, Drafting, DraftPasses
from serving.errors import MoejaxError
from serving.protocol.request import Finished, Scored, Token

Output = tuple[str, Scored | Token | Finished | MoejaxError]
"""An item for the client of a request: scores of its prompt, a token, or the one end of its stream (Finished or a typed
error)."""


@dataclasses.dataclass(frozen=True)
class EngineState:
    """All requests between acceptance and end. `waiting` is in order of arrival; mappings never change."""

    limits: Limits
    pools: Mapping[int, PagePool]
    epoch: int = 0
    waiting: Mapping[str, Sequence] = dataclasses.field(default_factory=dict)
    running: Mapping[str, Sequence] = dataclasses.field(default_factory=dict)
    step: int = 0
    """Steps made so far."""
    in_flight: tuple[int, ...] = ()
    """Steps whose results are awaited, in this order; results of any other are refused."""
    arrivals: int = 0
    preemptions: int = 0
    decode_first: bool = False
    """After a loss, until one step has gone to the survivors' streams alone."""
    root_key: PageKey = b""
    """The root of all page keys. It depends on the masked experts and on the weights."""
    prefix_queries: int = 0
    """Prompt tokens looked up in the prefix cache so far."""
    prefix_hits: int = 0
    """Of these, found there."""
    counters: TokenCounters = dataclasses.field(default_factory=TokenCounters)
    """The tokens that each owner of requests has been served."""
    drafts: int = 0
    """Times that a request had drafts in a step that is done."""
    drafted: int = 0
    """Tokens of these drafts."""
    accepted: int = 0
    """Of these, tokens that were sent."""
    draft_passes: DraftPasses = dataclasses.field(default_factory=DraftPasses)
    """When the model's layer that drafts runs."""
    draft_passes_skipped: int = 0
    """Steps that are done after which it did not run, of a server whose model drafts."""
    admitted: int = 0
    """Requests that were given their first rank so far."""
    closed_ranks: frozenset[int] = frozenset()
    """Ranks that leave: they admit no requests."""
    weights: int = 0
    """The number of the weights that compute: all KV in the caches is theirs."""
    held: bool = False
    """Only requests that have started are given a rank; the others wait for other weights."""
    canaries: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """The rank of each canary: while there are any, no other request is in a step."""
    suspicion: Suspicion = dataclasses.field(default_factory=Suspicion)
    """Requests that ran while ranks failed."""
    decodes: bool = True
    """Whether requests get decode rows. If not, they stop once a single token is left to compute, and another pool goes
    on with them."""
    sent: Mapping[str, Sequence] = dataclasses.field(default_factory=dict)
    """Requests that another pool goes on with, whose pages are held until it has their entries."""

    @classmethod
    def start(cls, limits: Limits, pages: Mapping[int, int], *, epoch: int = 0) -> "EngineState":
        """No requests, and an empty cache of `pages[rank]` pages on every rank."""
        return cls(limits, {rank: PagePool.empty(count) for rank, count in pages.items()}, epoch)

    def with_suspicion(self, suspicion: Suspicion) -> "EngineState":
        """The same requests under another suspicion."""
        return dataclasses.replace(self, suspicion=suspicion)

    @property
    def first_drafting(self) -> Drafting:
        """The experience with drafts that a new request begins with."""
        return self.draft_passes.first_drafting() if self.limits.model_drafts else NOTHING_DRAFTED

    def find(self, request_id: str) -> Sequence | None:
        """The open request of that id."""
        return self.running.get(request_id) or self.waiting.get(request_id)


def requeue(waiting: Mapping[str, Sequence], sequences: Iterable[Sequence]) -> dict[str, Sequence]:
    """The queue with these sequences, preempted, in order of arrival: they stand before requests that came later."""
    back = [sequence.preempted() for sequence in sequences]
    merged = sorted((*back, *waiting.values()), key=lambda sequence: sequence.arrival)
    return {sequence.id: sequence for sequence in merged}


def remove_requests(state: EngineState, request_ids: Iterable[str]) -> EngineState:
    """The state without requests that have ended; their pages are released."""
    waiting, running, pools = dict(state.waiting), dict(state.running), dict(state.pools)
    for request_id in request_ids:
        sequence = running.pop(request_id, None) or waiting.pop(request_id)
        if sequence.rank is not None:
            pools[sequence.rank] = pools[sequence.rank].release(sequence.pages)
    return dataclasses.replace(state, waiting=waiting, running=running, pools=pools)


def seal_full_pages(state: EngineState, sequence: Sequence, pool: PagePool) -> tuple[Sequence, PagePool]:
    """The sequence and its rank's pool after its full pages were made known."""
    size, page_keys = state.limits.page_size, sequence.page_keys
    if not state.limits.prefix_caching or page_keys is None or sequence.committed // size == len(page_keys):
        return sequence, pool
    start, before = len(page_keys) * size, page_keys[-1] if page_keys else state.root_key
    fresh = hash_pages(sequence.tokens(start, sequence.committed), size, before)
    for page, key in zip(sequence.pages[len(page_keys) :], fresh, strict=False):
        pool = pool.seal(page, key)
    return dataclasses.replace(sequence, page_keys=page_keys + fresh), pool
