"""What can be asked of a running server, as values, and the one seam between the surfaces and the loop."""

import dataclasses
from collections.abc import AsyncIterator, Mapping
from typing import Protocol

from planner.deployment import Deployment
from serving.faults import DeviceError, Instruction, Response
from serving.ledger import Call
from serving.request import Finished, Request, Scored, Token

SIGNALS = ("SIGKILL", "SIGSTOP")
SIGNALS_TO_WEIGHTS = ("NAN", "BITFLIP")
"""What `Backend.kill` can do to a rank's process, and to the weights of an expert it holds."""


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
class LossCost:
    """What the loss of one rank would cost. `stall_ms` is how long streams on the other ranks would wait, `traffic`
    the share of expert traffic whose only copy is there, `experts_to_load` (layer, expert) pairs read from the host's
    store. `measured` tells whether the phases are this server's own or estimates."""

    survivable: bool
    prepared: bool
    stall_ms: float
    experts_to_load: int
    traffic: float
    measured: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankStatus:
    """One rank. `state` is starting, serving, draining, dead, joining, out or failed; `role` collocated, attention or
    expert; `slots[moe_layer]` the experts held. `slowness` is how much slower than the others its own work is of late
    (0: unknown), `level` that of the last device error (0: none)."""

    id: int
    pid: int | None
    host: str
    state: str
    role: str = "collocated"
    slots: tuple[tuple[int, ...], ...] = ()
    pages: int = 0
    pages_used: int = 0
    running: int = 0
    compiles: int = 0
    step_ms: float = 0.0
    slowness: float = 0.0
    level: int = 0
    rack: str = ""
    loss: LossCost | None = None


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
    rank_ms: float
    """Of these, from taking up a step to having its answer, on the rank that spent most."""
    program_ms: float
    """Of these, inside the compiled programs, on the rank that spent most. Steps overlap where one is made ahead: the
    slowest rank of each would count some time twice."""
    preemptions: int
    prefix_queries: int
    """Prompt tokens looked up in the prefix caches."""
    prefix_hits: int
    """Of these, found there."""
    compiles_after_ready: int
    started_at: float
    page_size: int
    experts_loaded: int
    """Expert weights read from the host's store since the start."""
    expert_load: tuple[tuple[int, ...], ...]
    """[moe_layer][expert]: tokens routed there since the start."""
    paused: bool = False
    operable: bool = False
    """Callers on this machine may apply instructions and report device errors."""
    degraded: int = 0
    """Requests that ended with tokens made while experts were masked."""
    restored: int = 0
    """Weights that were found damaged and put right."""
    journal: str = "off"
    """"on", "off", or "failing": requests are served and would not outlive this front."""
    protection: str = "off"
    """How caches outlive their ranks: "memory", "stream" or "off"."""
    protected_bytes: int = 0
    """Host memory that copies of caches take now."""
    experts_rebuilt: int = 0
    """Experts that were made again from parity since the start."""
    parity_groups: int = 0
    parity_wanted: int = 0
    """Parity groups that are made, and how many there are to be."""
    parity_bytes: int = 0
    """Host memory of ranks that they take."""
    tokens_restored: int = 0
    """Cache entries of requests whose rank died that were restored from a copy."""
    tokens_recomputed: int = 0
    """Of these, computed again."""
    front_pid: int = 0
    """The front's process, on its machine."""
    rows: int = 0
    """Rows that steps have computed on all ranks: of the smallest bucket that held each."""
    rows_filled: int = 0
    """Of these, a token of some request; the others are padding."""
    buckets: tuple[tuple[int, int], ...] = ()
    """The shapes that steps are compiled for: decode rows, tiles of 32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prospect:
    """What the loss of a rank or a host would cost at this moment. Stalls are predicted, in milliseconds."""

    kind: str
    name: str
    ranks: tuple[int, ...]
    survivable: bool
    reason: str
    prepared: bool
    requests_moved: int
    tokens_recomputed: int
    experts_loaded: int
    stall_ms: float
    moved_stall_ms: float
    capacity: float
    traffic_lost: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened. `phases` holds milliseconds by phase (detect, fence, plan, adopt, resume ...).

    `kind` is one of: ready, draining, paused, resumed (of the server); rank_lost, recovered, no_capacity, broken,
    step_failed, rejoined, rejoin_failed, restart_failed, lattice_ready, cache_restored, not_restored, unprotected
    (recovery); leaving, drained, drain_failed
    (planned); device_error, slow, pace_recovered (ranks); poisoned, damaged, restored, masked, healed,
    store_unreadable (weights); restored_calls, journal_failed, journal_back (the journal).
    """

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

    @property
    def resumable(self) -> bool:
        """Whether calls are kept to be told again."""
        ...

    def stream(self, request: Request) -> AsyncIterator[Scored | Token | Finished]:
        """Accept a request and yield scores of its prompt, its tokens, then one Finished. Raises QueueFull,
        NoCapacity, Draining, DeadlineExceeded, Cancelled or PromptTooLong. Leaving the iterator cancels the request."""
        ...

    def replay(self, request_id: str) -> AsyncIterator[Scored | Token | Finished]:
        """All that `stream` has yielded for a request of a call that `recall` knows, then as `stream`."""
        ...

    def remember(self, call: Call) -> None:
        """A call whose requests will be streamed: it can be told again, by the front after this one too."""
        ...

    def left(self, call_id: str) -> None:
        """The caller of a call has gone, or has all of it."""
        ...

    def recall(self, call_id: str, owner: str) -> Call:
        """A call of that owner's. Raises UnknownRequest."""
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

    async def kill(self, rank: int, signal: str = "SIGKILL", host: str = "") -> None:
        """Kill or stop a rank process (or, with SIGNALS_TO_WEIGHTS, spoil an expert of it), or all of a host, for tests
        and demonstrations. Raises NotPermitted without --chaos."""
        ...

    def what_if(self) -> tuple[Prospect, ...]:
        """What the loss of each rank, and of each host of several, would cost now."""
        ...

    def deployment(self) -> Deployment | None:
        """The plan in force with its model, cluster, measured loads and traffic; None while no rank is alive."""
        ...

    async def apply(self, instruction: Instruction) -> tuple[int, ...]:
        """Carry out a planned change; returns the ranks that serve when it is done. The caller has been checked
        (`serving.faults.permit`). Raises InvalidRequest and NoCapacity."""
        ...

    def report(self, error: DeviceError) -> Response:
        """Take note of a device's error; returns what is done about it. Raises UnknownRequest."""
        ...
