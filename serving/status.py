"""What can be asked of a running server, as values, and the one seam between the surfaces and the loop."""

import dataclasses
from collections.abc import AsyncIterator, Mapping
from typing import Protocol

from serving.request import Finished, Request, Token


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The model being served."""

    name: str
    vocab_size: int
    max_context: int
    stop_tokens: tuple[int, ...]
    bos_token: int | None
    layers: int
    moe_layers: int
    experts: int
    experts_per_token: int
    parameters: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankStatus:
    """One rank. `state` is starting, serving, dead, joining or failed; `slots[moe_layer]` the experts held."""

    id: int
    pid: int | None
    host: str
    state: str
    slots: tuple[tuple[int, ...], ...] = ()
    pages: int = 0
    pages_used: int = 0
    running: int = 0
    compiles: int = 0
    step_ms: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """The whole server at one moment. Times are in seconds since the epoch, coverage between 0 and 1."""

    epoch: int
    generation: int
    ready: bool
    draining: bool
    chaos: bool
    ranks: tuple[RankStatus, ...]
    axes: Mapping[str, int]
    slots_per_rank: int
    masked: tuple[tuple[int, int], ...]
    lattice: Mapping[str, float]
    """Coverage by kind of loss: {"1 rank": 1.0, "2 ranks": 1.0}."""
    running: int
    waiting: int
    finished: int
    failed: int
    recoveries: int
    tokens: int
    steps: int
    step_ms: float
    """Of all steps together, from scheduling a step to having delivered its tokens."""
    program_ms: float
    """Of these, inside the compiled programs of each step's slowest rank."""
    preemptions: int
    compiles_after_ready: int
    started_at: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened: `kind` is one of ready, rank_lost, recovered, rejoined, no_capacity,
    lattice_ready, draining. `phases` holds milliseconds by phase (detect, fence, plan, adopt, resume ...)."""

    sequence: int
    time: float
    kind: str
    epoch: int
    rank: int | None = None
    cause: str = ""
    phases: Mapping[str, float] = dataclasses.field(default_factory=dict)
    message: str = ""


class Backend(Protocol):
    """What HTTP, gRPC and the in-process client need. Implemented by `serving.loop.Loop` and by a fake in tests."""

    model: ModelInfo

    def stream(self, request: Request) -> AsyncIterator[Token | Finished]:
        """Accept a request and yield its tokens, then one Finished. Raises QueueFull, NoCapacity, Draining,
        DeadlineExceeded, Cancelled or PromptTooLong. Leaving the iterator cancels the request."""
        ...

    def abort(self, request_id: str) -> bool:
        """Cancel a request; False when it is not known."""
        ...

    def status(self) -> Status:
        """The server now."""
        ...

    def watch(self, after: int = 0) -> AsyncIterator[Event]:
        """Events with a sequence above `after`, past ones first, then as they happen."""
        ...

    async def kill(self, rank: int, signal: str = "SIGKILL") -> None:
        """Kill or stop a rank process, for tests and demonstrations. Raises NotPermitted without --chaos."""
        ...
