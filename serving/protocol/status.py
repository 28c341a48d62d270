"""The status of a running server, as values."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossCost:
    """The predicted cost of losing one rank: `stall_ms` for which streams on other ranks would wait, `traffic` the
    share of expert traffic whose only copy is on the rank, `experts_to_load` (layer, expert) pairs to read from the
    host's store. `measured` says whether the phases are this server's own or estimates."""

    survivable: bool
    prepared: bool
    stall_ms: float
    experts_to_load: int
    traffic: float
    measured: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankStatus:
    """The status of one rank. `state` is starting, serving, draining, dead, joining or out; `role` collocated,
    attention, expert, prefill or decode; `slots[moe_layer]` are the experts held. `slowness` is the ratio of its own
    work to that of other ranks lately (0: unknown), `level` the level of the last device error (0: none)."""

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
    last_failure: str = ""
    """How a process of this rank failed of itself the last time: its exception or crash; empty if none did."""
    loss: LossCost | None = None
    build: str = ""
    """The version and a digest of the sources that it runs; empty before it has attached."""
    relay: str = ""
    """The host whose agent passes on its stream; empty while it has a stream of its own."""
    snapshots: int = 0
    """Most snapshots of states that it keeps for prefix caching; 0 of a model without layers that have states."""
    snapshots_used: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EdgeStatus:
    """The status of one edge: its process id, whether clients can connect to it, and how many calls it has open."""

    pid: int
    serving: bool
    calls: int
    build: str = ""
    """The version and a digest of the sources that it runs."""
    host: str = ""
    """The name of its host; empty for an edge beside the front."""

    def __str__(self) -> str:
        return f"pid {self.pid}" + (f" on {self.host}" if self.host else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolStatus:
    """The status of one pool, with arch pd: `name` is prefill or decode, `serving` whether a plan is in force. While it
    is not, the other pool does its work."""

    name: str
    serving: bool
    epoch: int
    generation: int
    ranks: int
    running: int
    waiting: int
    steps: int
    step_ms: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """The status of a server at one moment. Times are in seconds since the epoch, coverage is between 0 and 1."""

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
    """Milliseconds of all steps, from scheduling a step to delivering its tokens."""
    rank_ms: float
    """Milliseconds of them from receiving a step to its result, on the slowest rank."""
    program_ms: float
    """Milliseconds of them inside the compiled programs. The maximum over ranks of their sums, not the sum of the
    maxima: steps overlap, and time would count twice."""
    preemptions: int
    prefix_queries: int
    """Prompt tokens looked up in the prefix caches."""
    prefix_hits: int
    """Prompt tokens found there."""
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
    """Damaged weights that were loaded again."""
    journal: str = "off"
    """"on", "off", or "failing": requests are served and would not outlive this front."""
    protection: str = "off"
    """How KV caches are replicated: "memory", "stream" or "off"."""
    protected_bytes: int = 0
    """Host memory of the KV replicas, in bytes."""
    experts_rebuilt: int = 0
    """Experts rebuilt from parity since the start."""
    parity_groups: int = 0
    parity_wanted: int = 0
    """Parity groups that are made, and that the plan asks for."""
    parity_bytes: int = 0
    """Host memory of parity on all ranks, in bytes."""
    tokens_restored: int = 0
    """KV entries of lost ranks restored from a replica."""
    tokens_recomputed: int = 0
    """KV entries of lost ranks computed again."""
    front_pid: int = 0
    """Process id of the front, on its machine."""
    edges: tuple[EdgeStatus, ...] = ()
    """The edges that are connected; none where the front holds the clients' connections itself."""
    rows: int = 0
    """Rows computed in steps on all ranks, padding included."""
    rows_filled: int = 0
    """Rows that were a token of a request."""
    kv_cache_type: str = "float32"
    """The data type of keys and values in the KV cache."""
    kv_token_bytes: int = 0
    """Bytes of the KV cache of one token, over all layers."""
    speculate: str = "off"
    """How tokens are drafted for requests that do not say: "mtp", "ngram" or "off"."""
    drafts: int = 0
    """Times that a request had drafts in a step."""
    drafted: int = 0
    """Tokens of these drafts."""
    accepted: int = 0
    """Of these, tokens that were right and were sent."""
    draft_passes_skipped: int = 0
    """With speculate "mtp", steps after which the model's layer that drafts did not run, since its guesses were not
    worth the wait."""
    suspects: int = 0
    """Requests that run alone, because ranks failed while they ran."""
    convicted: int = 0
    """Requests that were ended since the start, because ranks failed whenever they ran."""
    buckets: tuple[tuple[int, int], ...] = ()
    """Buckets that steps are compiled for: decode rows, tiles of 32."""
    weights_version: str = "0"
    """The label of the weights in force."""
    next_weights_version: str = ""
    """The label of weights that are being loaded; empty when none are."""
    weights_switches: int = 0
    """Versions of the weights that came into force since the start."""
    certificate: str = ""
    """"holds", "does not hold" or "checking"; empty without a certificate."""
    certificate_reason: str = ""
    """Why it does not hold."""
    certificate_repair: str = ""
    """The ranks with which it would hold again; empty when none are known."""
    pools: tuple[PoolStatus, ...] = ()
    """The pools, with arch pd."""
    requests_sent: int = 0
    """Requests that went from the prefill pool to the decode pool."""
    requests_returned: int = 0
    """Requests that went back, to be computed again."""
    build: str = ""
    """The version and a digest of the sources that the front runs."""
    upgrade: str = ""
    """The last upgrade: "running", "rolling_back", "done" or "rolled_back"; empty before the first."""
    upgrade_stage: str = ""
    """The processes that are replaced now: "front", "edges" or "ranks"."""
    upgrade_build: str = ""
    """The build that processes are to run."""
    upgrade_cause: str = ""
    """Why the upgrade is, or was, rolled back."""
    upgrades_done: int = 0
    upgrades_rolled_back: int = 0
    """Upgrades that ended so, since the start."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossForecast:
    """The predicted cost of losing a rank or a host at this moment. Stalls are in milliseconds; they and the capacity
    have the ends of their range, as wide as `range_source` says."""

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
    stall_low_ms: float = 0.0
    stall_high_ms: float = 0.0
    moved_stall_low_ms: float = 0.0
    moved_stall_high_ms: float = 0.0
    capacity_low: float = 0.0
    capacity_high: float = 0.0
    range_source: str = ""
