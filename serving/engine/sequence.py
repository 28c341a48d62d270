"""One accepted request on its way: its tokens so far, its rank, and how much of it is in the rank's cache."""

import dataclasses

from serving.pages import Key
from serving.request import Phase, Request


@dataclasses.dataclass(frozen=True, slots=True)
class Salvage:
    """Cache entries that outlived their rank: those of positions 0 .. count - 1, in `pages` of the copies of these
    numbers (serving/cache_copies.py), one for each share of the heads. `chain` is that of the sequence there, as far as
    they reach."""

    copies: tuple[int, ...]
    pages: tuple[int, ...]
    count: int
    chain: tuple[Key, ...] | None = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Ahead:
    """What a step in flight does for a request: it computes from position `start` on. It may make a token, and be the
    last that is needed."""

    step: int
    start: int
    samples: bool
    last: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Sequence:
    """A request and its state. Taking it off its rank forgets what is below `generated`, but for `salvage`.

    `arrival` orders requests for their whole life. Positions 0 .. computed - 1 are in the cache of `rank`,
    in `pages`, once the steps of `ahead` are in; those below `settled` are there now, and tokens that those steps make
    are unknown. The last token made is never in the cache: its keys and values come with the next step.
    `chain` has the keys of its full pages; None when others must not find them. `reused` counts the prompt
    tokens that were found in the cache when it was first placed; `scored` those whose log-probabilities were told.
    With `salvage` and a rank it is being restored: positions up to `salvage.count` come from a copy, before any step
    works on it.
    """

    request: Request
    arrival: int
    generated: tuple[int, ...] = ()
    reused: int | None = None
    scored: int = 0
    rank: int | None = None
    computed: int = 0
    pages: tuple[int, ...] = ()
    chain: tuple[Key, ...] | None = ()
    salvage: Salvage | None = None
    ahead: tuple[Ahead, ...] = ()

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def started(self) -> bool:
        """Whether it has had a place on a rank before."""
        return self.reused is not None

    @property
    def restoring(self) -> bool:
        """Whether it has a place and waits for its cache entries."""
        return self.rank is not None and self.salvage is not None

    @property
    def settled(self) -> int:
        """Positions that are in the cache whatever becomes of the steps in flight."""
        return self.ahead[0].start if self.ahead else self.computed

    @property
    def known(self) -> int:
        """Tokens generated that are known."""
        return len(self.generated) - sum(each.samples for each in self.ahead)

    @property
    def ending(self) -> bool:
        """Whether a step in flight is its last."""
        return any(each.last for each in self.ahead)

    def withdrawn(self) -> "Sequence":
        """The sequence as it is when no step in flight comes in."""
        if not self.ahead:
            return self
        return dataclasses.replace(self, generated=self.generated[: self.known], computed=self.settled, ahead=())

    @property
    def length(self) -> int:
        """Tokens so far: the prompt and those generated."""
        return len(self.request.prompt) + len(self.generated)

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are not in the cache. One means that a decode row is all it needs."""
        return self.length - self.computed

    @property
    def unscored(self) -> int:
        """Prompt tokens whose log-probabilities are still to be told."""
        return 0 if self.request.prompt_logprobs is None else len(self.request.prompt) - 1 - self.scored

    @property
    def phase(self) -> Phase:
        if self.rank is None:
            return Phase.WAITING
        return Phase.DECODE if self.pending == 1 and not self.restoring else Phase.PREFILL

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """The tokens at positions start .. stop - 1 of prompt + generated."""
        prompt = self.request.prompt
        if start >= len(prompt):
            return self.generated[start - len(prompt) : stop - len(prompt)]
        if stop <= len(prompt):
            return prompt[start:stop]
        return prompt[start:] + self.generated[: stop - len(prompt)]

    def placed(
        self, rank: int, pages: tuple[int, ...], *, computed: int = 0, chain: tuple[Key, ...] | None = ()
    ) -> "Sequence":
        """The sequence on a rank whose cache has the first `computed` positions of it, in full pages."""
        reused = computed if self.reused is None else self.reused
        return dataclasses.replace(self, rank=rank, reused=reused, computed=computed, pages=pages, chain=chain)

    def displaced(self) -> "Sequence":
        """The sequence without a rank: prompt + tokens so far, to be computed again, but for what was salvaged."""
        return dataclasses.replace(self.withdrawn(), rank=None, computed=0, pages=(), chain=())

    def forgotten(self) -> "Sequence":
        """The sequence without a rank, to be computed again from its first token."""
        return dataclasses.replace(self.displaced(), salvage=None)
