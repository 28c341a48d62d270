"""One accepted request on its way: its tokens so far, its rank, and how much of it is in the rank's cache."""

import dataclasses

from serving.request import Phase, Request


@dataclasses.dataclass(frozen=True, slots=True)
class Sequence:
    """A request and its state. Taking it off its rank forgets `rank`, `computed` and `pages`, nothing else.

    `arrival` orders requests for their whole life. Positions 0 .. computed - 1 are in the cache of `rank`,
    in `pages`. The last token made is never in the cache: its keys and values come with the next step.
    """

    request: Request
    arrival: int
    generated: tuple[int, ...] = ()
    rank: int | None = None
    computed: int = 0
    pages: tuple[int, ...] = ()

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def length(self) -> int:
        """Tokens so far: the prompt and those generated."""
        return len(self.request.prompt) + len(self.generated)

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are not in the cache. One means that a decode row is all it needs."""
        return self.length - self.computed

    @property
    def phase(self) -> Phase:
        if self.rank is None:
            return Phase.WAITING
        return Phase.DECODE if self.pending == 1 else Phase.PREFILL

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """The tokens at positions start .. stop - 1 of prompt + generated."""
        prompt = self.request.prompt
        if start >= len(prompt):
            return self.generated[start - len(prompt) : stop - len(prompt)]
        if stop <= len(prompt):
            return prompt[start:stop]
        return prompt[start:] + self.generated[: stop - len(prompt)]

    def placed(self, rank: int, pages: tuple[int, ...]) -> "Sequence":
        """The sequence on a rank, with nothing of it in the cache yet."""
        return Sequence(self.request, self.arrival, self.generated, rank, 0, pages)

    def displaced(self) -> "Sequence":
        """The sequence without a rank: prompt + tokens so far, to be computed again."""
        return Sequence(self.request, self.arrival, self.generated)
