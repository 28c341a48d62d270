"""The sizes of an engine that do not change while the server runs."""

import dataclasses
from typing import Self

from planner.inputs.layer_states import SNAPSHOTS_PER_REQUEST, STATE_COPIES
from serving.config import Settings
from serving.engine.batch import StepBucket
from serving.engine.speculation import PASS_LAYERS
from serving.protocol.request import FinishReason, Request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The sizes of an engine, in tokens; `max_queue` in requests. Requests that leave it open are drafted for if
    `speculate`, by the model itself if `model_drafts`, which makes so many for each after a step, for
    `draft_cost` of its time; a request gets `draft_tokens` drafts in a step, None: as many as were right so far."""

    page_size: int
    max_context: int
    max_queue: int
    buckets: tuple[StepBucket, ...]
    tiles_while_decoding: int
    prefix_caching: bool = True
    speculate: bool = False
    draft_tokens: int | None = None
    model_drafts: int = 0
    draft_cost: float = 0.0
    states: bool = False
    """Requests have states on their rank: the model has layers whose context is a state."""
    snapshots: int = 0
    """Most snapshots of states that a rank keeps: with states, a prefix is shared up to one of them."""

    @classmethod
    def of(cls, settings: Settings, max_context: int, *, states: bool = False, layers: int = 0) -> Self:
        """The sizes that the settings want, for contexts of at most `max_context` tokens, and for a model with or
        without `states`; `layers` has it in all, with the one that drafts."""
        return cls(
            page_size=settings.page_size,
            max_context=max_context,
            max_queue=settings.max_queue,
            buckets=tuple(StepBucket(*bucket) for bucket in settings.buckets),
            tiles_while_decoding=settings.tiles_while_decoding,
            prefix_caching=settings.prefix_caching,
            speculate=settings.speculate != "off",
            draft_tokens=settings.draft_tokens,
            model_drafts=settings.model_drafts,
            draft_cost=settings.model_drafts * PASS_LAYERS / (layers - 1) if layers > 1 else 0.0,
            states=states,
            snapshots=snapshots_per_rank(settings) if states else 0,
        )

    def __post_init__(self) -> None:
        object.__setattr__(self, "buckets", tuple(StepBucket(*bucket) for bucket in self.buckets))
        bounds = {"page_size": 1, "max_context": 2, "max_queue": 1, "tiles_while_decoding": 1}
        for name, least in bounds.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if not self.buckets or self.max_decode_rows < 1 or self.max_tiles < 1:
            raise ValueError(f"buckets {self.buckets} need one with decode rows and one with prefill tiles.")
        if (self.max_decode_rows, self.max_tiles) not in self.buckets:
            raise ValueError(
                f"no bucket covers {self.max_decode_rows} decode rows with {self.max_tiles} tiles. "
                f"Add ({self.max_decode_rows}, {self.max_tiles}) to the buckets."
            )

    @property
    def max_decode_rows(self) -> int:
        """Decode rows of the largest bucket: the most sequences that a rank runs."""
        return max((bucket.decode for bucket in self.buckets), default=0)

    @property
    def max_tiles(self) -> int:
        """Prefill tiles of the largest bucket."""
        return max((bucket.tiles for bucket in self.buckets), default=0)

    @property
    def snapshot_places(self) -> range:
        """The places of snapshots in a rank's cache: they follow the states of all requests that it can run."""
        first = STATE_COPIES * self.max_decode_rows
        return range(first, first + self.snapshots)

    @property
    def max_pages(self) -> int:
        """Pages of the longest sequence: the width of a page table."""
        return self.pages_for(self.max_context)

    def pages_for(self, positions: int) -> int:
        """Number of pages that hold this many positions."""
        return -(-positions // self.page_size)

    def pages_needed(self, request: Request) -> int:
        """Pages of a request that runs to its end. The last token is never written to the cache."""
        length = len(request.prompt)
        return self.pages_for(max(length, min(length + request.sampling.max_tokens, self.max_context) - 1))

    def speculates(self, request: Request) -> bool:
        """Whether the request is drafted for. None is that has states: those cannot go back to the last draft that was
        right (`submit` refuses one that asks for drafts)."""
        wanted = request.sampling.speculate
        return not self.states and (self.speculate if wanted is None else wanted)

    def tokens_left(self, request: Request, generated: int) -> int:
        """The most tokens that a request which has generated this many may still get."""
        return min(request.sampling.max_tokens, self.max_context - len(request.prompt)) - generated

    def length_reason(self, request: Request, generated: int) -> FinishReason | None:
        """Why a request that has generated this many tokens ends, None when it goes on."""
        full = generated >= request.sampling.max_tokens or len(request.prompt) + generated >= self.max_context
        return "length" if full else None


def snapshots_per_rank(settings: Settings) -> int:
    """Snapshots of states that a rank keeps, of a model with layers that have states: as set; else
    SNAPSHOTS_PER_REQUEST for each request that it can run. None without prefix caching."""
    if not settings.prefix_caching:
        return 0
    usual = SNAPSHOTS_PER_REQUEST * max(decode for decode, _ in settings.buckets)
    return usual if settings.state_snapshots is None else settings.state_snapshots
