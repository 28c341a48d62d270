from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Status(_message.Message):
    __slots__ = ("epoch", "generation", "ready", "draining", "chaos", "ranks", "axes", "slots_per_rank", "masked", "lattice", "running", "waiting", "finished", "failed", "recoveries", "tokens", "steps", "preemptions", "compiles_after_ready", "started_at", "step_ms", "program_ms", "prefix_queries", "prefix_hits", "page_size", "experts_loaded", "expert_load", "paused", "operable", "degraded", "restored", "rank_ms", "journal", "protection", "protected_bytes", "tokens_restored", "tokens_recomputed", "front_pid", "experts_rebuilt", "parity_groups", "parity_wanted", "parity_bytes", "rows", "rows_filled", "buckets", "suspects", "convicted", "certificate", "certificate_reason", "certificate_repair", "edges", "speculate", "drafts", "drafted", "accepted", "weights_version", "next_weights_version", "weights_switches", "pools", "requests_sent", "requests_returned", "build", "upgrade", "upgrade_stage", "upgrade_build", "upgrade_cause", "upgrades_done", "upgrades_rolled_back", "kv_cache_type", "kv_token_bytes", "draft_passes_skipped")
    class AxesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class LatticeEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    CHAOS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    AXES_FIELD_NUMBER: _ClassVar[int]
    SLOTS_PER_RANK_FIELD_NUMBER: _ClassVar[int]
    MASKED_FIELD_NUMBER: _ClassVar[int]
    LATTICE_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    RECOVERIES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    COMPILES_AFTER_READY_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    STEP_MS_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_MS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_QUERIES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HITS_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_LOADED_FIELD_NUMBER: _ClassVar[int]
    EXPERT_LOAD_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    OPERABLE_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    RESTORED_FIELD_NUMBER: _ClassVar[int]
    RANK_MS_FIELD_NUMBER: _ClassVar[int]
    JOURNAL_FIELD_NUMBER: _ClassVar[int]
    PROTECTION_FIELD_NUMBER: _ClassVar[int]
    PROTECTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_RESTORED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_RECOMPUTED_FIELD_NUMBER: _ClassVar[int]
    FRONT_PID_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_REBUILT_FIELD_NUMBER: _ClassVar[int]
    PARITY_GROUPS_FIELD_NUMBER: _ClassVar[int]
    PARITY_WANTED_FIELD_NUMBER: _ClassVar[int]
    PARITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FILLED_FIELD_NUMBER: _ClassVar[int]
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    SUSPECTS_FIELD_NUMBER: _ClassVar[int]
    CONVICTED_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_REASON_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_REPAIR_FIELD_NUMBER: _ClassVar[int]
    EDGES_FIELD_NUMBER: _ClassVar[int]
    SPECULATE_FIELD_NUMBER: _ClassVar[int]
    DRAFTS_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    NEXT_WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_SWITCHES_FIELD_NUMBER: _ClassVar[int]
    POOLS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_SENT_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_RETURNED_FIELD_NUMBER: _ClassVar[int]
    BUILD_FIELD_NUMBER: _ClassVar[int]
    UPGRADE_FIELD_NUMBER: _ClassVar[int]
    UPGRADE_STAGE_FIELD_NUMBER: _ClassVar[int]
    UPGRADE_BUILD_FIELD_NUMBER: _ClassVar[int]
    UPGRADE_CAUSE_FIELD_NUMBER: _ClassVar[int]
    UPGRADES_DONE_FIELD_NUMBER: _ClassVar[int]
    UPGRADES_ROLLED_BACK_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_TYPE_FIELD_NUMBER: _ClassVar[int]
    KV_TOKEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    DRAFT_PASSES_SKIPPED_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    generation: int
    ready: bool
    draining: bool
    chaos: bool
    ranks: _containers.RepeatedCompositeFieldContainer[Rank]
    axes: _containers.ScalarMap[str, int]
    slots_per_rank: int
    masked: _containers.RepeatedCompositeFieldContainer[MaskedExpert]
    lattice: _containers.ScalarMap[str, float]
    running: int
    waiting: int
    finished: int
    failed: int
    recoveries: int
    tokens: int
    steps: int
    preemptions: int
    compiles_after_ready: int
    started_at: float
    step_ms: float
    program_ms: float
    prefix_queries: int
    prefix_hits: int
    page_size: int
    experts_loaded: int
    expert_load: _containers.RepeatedCompositeFieldContainer[ExpertLoad]
    paused: bool
    operable: bool
    degraded: int
    restored: int
    rank_ms: float
    journal: str
    protection: str
    protected_bytes: int
    tokens_restored: int
    tokens_recomputed: int
    front_pid: int
    experts_rebuilt: int
    parity_groups: int
    parity_wanted: int
    parity_bytes: int
    rows: int
    rows_filled: int
    buckets: _containers.RepeatedCompositeFieldContainer[StepShape]
    suspects: int
    convicted: int
    certificate: str
    certificate_reason: str
    certificate_repair: str
    edges: _containers.RepeatedCompositeFieldContainer[Edge]
    speculate: str
    drafts: int
    drafted: int
    accepted: int
    weights_version: str
    next_weights_version: str
    weights_switches: int
    pools: _containers.RepeatedCompositeFieldContainer[Pool]
    requests_sent: int
    requests_returned: int
    build: str
    upgrade: str
    upgrade_stage: str
    upgrade_build: str
    upgrade_cause: str
    upgrades_done: int
    upgrades_rolled_back: int
    kv_cache_type: str
    kv_token_bytes: int
    draft_passes_skipped: int
    def __init__(self, epoch: _Optional[int] = ..., generation: _Optional[int] = ..., ready: bool = ..., draining: bool = ..., chaos: bool = ..., ranks: _Optional[_Iterable[_Union[Rank, _Mapping]]] = ..., axes: _Optional[_Mapping[str, int]] = ..., slots_per_rank: _Optional[int] = ..., masked: _Optional[_Iterable[_Union[MaskedExpert, _Mapping]]] = ..., lattice: _Optional[_Mapping[str, float]] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., finished: _Optional[int] = ..., failed: _Optional[int] = ..., recoveries: _Optional[int] = ..., tokens: _Optional[int] = ..., steps: _Optional[int] = ..., preemptions: _Optional[int] = ..., compiles_after_ready: _Optional[int] = ..., started_at: _Optional[float] = ..., step_ms: _Optional[float] = ..., program_ms: _Optional[float] = ..., prefix_queries: _Optional[int] = ..., prefix_hits: _Optional[int] = ..., page_size: _Optional[int] = ..., experts_loaded: _Optional[int] = ..., expert_load: _Optional[_Iterable[_Union[ExpertLoad, _Mapping]]] = ..., paused: bool = ..., operable: bool = ..., degraded: _Optional[int] = ..., restored: _Optional[int] = ..., rank_ms: _Optional[float] = ..., journal: _Optional[str] = ..., protection: _Optional[str] = ..., protected_bytes: _Optional[int] = ..., tokens_restored: _Optional[int] = ..., tokens_recomputed: _Optional[int] = ..., front_pid: _Optional[int] = ..., experts_rebuilt: _Optional[int] = ..., parity_groups: _Optional[int] = ..., parity_wanted: _Optional[int] = ..., parity_bytes: _Optional[int] = ..., rows: _Optional[int] = ..., rows_filled: _Optional[int] = ..., buckets: _Optional[_Iterable[_Union[StepShape, _Mapping]]] = ..., suspects: _Optional[int] = ..., convicted: _Optional[int] = ..., certificate: _Optional[str] = ..., certificate_reason: _Optional[str] = ..., certificate_repair: _Optional[str] = ..., edges: _Optional[_Iterable[_Union[Edge, _Mapping]]] = ..., speculate: _Optional[str] = ..., drafts: _Optional[int] = ..., drafted: _Optional[int] = ..., accepted: _Optional[int] = ..., weights_version: _Optional[str] = ..., next_weights_version: _Optional[str] = ..., weights_switches: _Optional[int] = ..., pools: _Optional[_Iterable[_Union[Pool, _Mapping]]] = ..., requests_sent: _Optional[int] = ..., requests_returned: _Optional[int] = ..., build: _Optional[str] = ..., upgrade: _Optional[str] = ..., upgrade_stage: _Optional[str] = ..., upgrade_build: _Optional[str] = ..., upgrade_cause: _Optional[str] = ..., upgrades_done: _Optional[int] = ..., upgrades_rolled_back: _Optional[int] = ..., kv_cache_type: _Optional[str] = ..., kv_token_bytes: _Optional[int] = ..., draft_passes_skipped: _Optional[int] = ...) -> None: ...

class Pool(_message.Message):
    __slots__ = ("name", "serving", "epoch", "generation", "ranks", "running", "waiting", "steps", "step_ms")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    STEP_MS_FIELD_NUMBER: _ClassVar[int]
    name: str
    serving: bool
    epoch: int
    generation: int
    ranks: int
    running: int
    waiting: int
    steps: int
    step_ms: float
    def __init__(self, name: _Optional[str] = ..., serving: bool = ..., epoch: _Optional[int] = ..., generation: _Optional[int] = ..., ranks: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., steps: _Optional[int] = ..., step_ms: _Optional[float] = ...) -> None: ...

class Edge(_message.Message):
    __slots__ = ("pid", "serving", "calls", "build", "host")
    PID_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    BUILD_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    pid: int
    serving: bool
    calls: int
    build: str
    host: str
    def __init__(self, pid: _Optional[int] = ..., serving: bool = ..., calls: _Optional[int] = ..., build: _Optional[str] = ..., host: _Optional[str] = ...) -> None: ...

class StepShape(_message.Message):
    __slots__ = ("decode", "tiles")
    DECODE_FIELD_NUMBER: _ClassVar[int]
    TILES_FIELD_NUMBER: _ClassVar[int]
    decode: int
    tiles: int
    def __init__(self, decode: _Optional[int] = ..., tiles: _Optional[int] = ...) -> None: ...

class ExpertLoad(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class LossCost(_message.Message):
    __slots__ = ("survivable", "prepared", "stall_ms", "experts_to_load", "traffic", "measured")
    SURVIVABLE_FIELD_NUMBER: _ClassVar[int]
    PREPARED_FIELD_NUMBER: _ClassVar[int]
    STALL_MS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_TO_LOAD_FIELD_NUMBER: _ClassVar[int]
    TRAFFIC_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    survivable: bool
    prepared: bool
    stall_ms: float
    experts_to_load: int
    traffic: float
    measured: bool
    def __init__(self, survivable: bool = ..., prepared: bool = ..., stall_ms: _Optional[float] = ..., experts_to_load: _Optional[int] = ..., traffic: _Optional[float] = ..., measured: bool = ...) -> None: ...

class Rank(_message.Message):
    __slots__ = ("id", "pid", "host", "state", "slots", "pages", "pages_used", "running", "compiles", "step_ms", "loss", "slowness", "level", "role", "rack", "last_failure", "build", "relay", "snapshots", "snapshots_used")
    ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    PAGES_USED_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    COMPILES_FIELD_NUMBER: _ClassVar[int]
    STEP_MS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    SLOWNESS_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    RACK_FIELD_NUMBER: _ClassVar[int]
    LAST_FAILURE_FIELD_NUMBER: _ClassVar[int]
    BUILD_FIELD_NUMBER: _ClassVar[int]
    RELAY_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTS_USED_FIELD_NUMBER: _ClassVar[int]
    id: int
    pid: int
    host: str
    state: str
    slots: _containers.RepeatedCompositeFieldContainer[Slots]
    pages: int
    pages_used: int
    running: int
    compiles: int
    step_ms: float
    loss: LossCost
    slowness: float
    level: int
    role: str
    rack: str
    last_failure: str
    build: str
    relay: str
    snapshots: int
    snapshots_used: int
    def __init__(self, id: _Optional[int] = ..., pid: _Optional[int] = ..., host: _Optional[str] = ..., state: _Optional[str] = ..., slots: _Optional[_Iterable[_Union[Slots, _Mapping]]] = ..., pages: _Optional[int] = ..., pages_used: _Optional[int] = ..., running: _Optional[int] = ..., compiles: _Optional[int] = ..., step_ms: _Optional[float] = ..., loss: _Optional[_Union[LossCost, _Mapping]] = ..., slowness: _Optional[float] = ..., level: _Optional[int] = ..., role: _Optional[str] = ..., rack: _Optional[str] = ..., last_failure: _Optional[str] = ..., build: _Optional[str] = ..., relay: _Optional[str] = ..., snapshots: _Optional[int] = ..., snapshots_used: _Optional[int] = ...) -> None: ...

class Slots(_message.Message):
    __slots__ = ("experts",)
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    experts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, experts: _Optional[_Iterable[int]] = ...) -> None: ...

class MaskedExpert(_message.Message):
    __slots__ = ("layer", "expert")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    layer: int
    expert: int
    def __init__(self, layer: _Optional[int] = ..., expert: _Optional[int] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("after",)
    AFTER_FIELD_NUMBER: _ClassVar[int]
    after: int
    def __init__(self, after: _Optional[int] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("sequence", "time", "kind", "epoch", "rank", "cause", "phases", "message", "severity")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    PHASES_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    SEVERITY_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    time: float
    kind: str
    epoch: int
    rank: int
    cause: str
    phases: _containers.RepeatedCompositeFieldContainer[Phase]
    message: str
    severity: str
    def __init__(self, sequence: _Optional[int] = ..., time: _Optional[float] = ..., kind: _Optional[str] = ..., epoch: _Optional[int] = ..., rank: _Optional[int] = ..., cause: _Optional[str] = ..., phases: _Optional[_Iterable[_Union[Phase, _Mapping]]] = ..., message: _Optional[str] = ..., severity: _Optional[str] = ...) -> None: ...

class Phase(_message.Message):
    __slots__ = ("name", "milliseconds")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MILLISECONDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    milliseconds: float
    def __init__(self, name: _Optional[str] = ..., milliseconds: _Optional[float] = ...) -> None: ...

class KillRequest(_message.Message):
    __slots__ = ("rank", "signal", "host")
    RANK_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    rank: int
    signal: str
    host: str
    def __init__(self, rank: _Optional[int] = ..., signal: _Optional[str] = ..., host: _Optional[str] = ...) -> None: ...

class KillResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WhatIfRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WhatIfResponse(_message.Message):
    __slots__ = ("prospects", "plan")
    PROSPECTS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    prospects: _containers.RepeatedCompositeFieldContainer[Prospect]
    plan: str
    def __init__(self, prospects: _Optional[_Iterable[_Union[Prospect, _Mapping]]] = ..., plan: _Optional[str] = ...) -> None: ...

class Prospect(_message.Message):
    __slots__ = ("kind", "name", "ranks", "survivable", "reason", "prepared", "requests_moved", "tokens_recomputed", "experts_loaded", "stall_ms", "moved_stall_ms", "capacity", "traffic_lost", "stall_low_ms", "stall_high_ms", "moved_stall_low_ms", "moved_stall_high_ms", "capacity_low", "capacity_high", "range_source")
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    SURVIVABLE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PREPARED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_MOVED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_RECOMPUTED_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_LOADED_FIELD_NUMBER: _ClassVar[int]
    STALL_MS_FIELD_NUMBER: _ClassVar[int]
    MOVED_STALL_MS_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    TRAFFIC_LOST_FIELD_NUMBER: _ClassVar[int]
    STALL_LOW_MS_FIELD_NUMBER: _ClassVar[int]
    STALL_HIGH_MS_FIELD_NUMBER: _ClassVar[int]
    MOVED_STALL_LOW_MS_FIELD_NUMBER: _ClassVar[int]
    MOVED_STALL_HIGH_MS_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_LOW_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_HIGH_FIELD_NUMBER: _ClassVar[int]
    RANGE_SOURCE_FIELD_NUMBER: _ClassVar[int]
    kind: str
    name: str
    ranks: _containers.RepeatedScalarFieldContainer[int]
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
    stall_low_ms: float
    stall_high_ms: float
    moved_stall_low_ms: float
    moved_stall_high_ms: float
    capacity_low: float
    capacity_high: float
    range_source: str
    def __init__(self, kind: _Optional[str] = ..., name: _Optional[str] = ..., ranks: _Optional[_Iterable[int]] = ..., survivable: bool = ..., reason: _Optional[str] = ..., prepared: bool = ..., requests_moved: _Optional[int] = ..., tokens_recomputed: _Optional[int] = ..., experts_loaded: _Optional[int] = ..., stall_ms: _Optional[float] = ..., moved_stall_ms: _Optional[float] = ..., capacity: _Optional[float] = ..., traffic_lost: _Optional[float] = ..., stall_low_ms: _Optional[float] = ..., stall_high_ms: _Optional[float] = ..., moved_stall_low_ms: _Optional[float] = ..., moved_stall_high_ms: _Optional[float] = ..., capacity_low: _Optional[float] = ..., capacity_high: _Optional[float] = ..., range_source: _Optional[str] = ...) -> None: ...

class ApplyRequest(_message.Message):
    __slots__ = ("action", "ranks", "host", "to", "replace", "timeout_s", "model", "version", "running", "path", "python")
    ACTION_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    PYTHON_FIELD_NUMBER: _ClassVar[int]
    action: str
    ranks: _containers.RepeatedScalarFieldContainer[int]
    host: str
    to: int
    replace: bool
    timeout_s: float
    model: str
    version: str
    running: str
    path: str
    python: str
    def __init__(self, action: _Optional[str] = ..., ranks: _Optional[_Iterable[int]] = ..., host: _Optional[str] = ..., to: _Optional[int] = ..., replace: bool = ..., timeout_s: _Optional[float] = ..., model: _Optional[str] = ..., version: _Optional[str] = ..., running: _Optional[str] = ..., path: _Optional[str] = ..., python: _Optional[str] = ...) -> None: ...

class ApplyResponse(_message.Message):
    __slots__ = ("serving", "epoch", "weights_version")
    SERVING_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    serving: _containers.RepeatedScalarFieldContainer[int]
    epoch: int
    weights_version: str
    def __init__(self, serving: _Optional[_Iterable[int]] = ..., epoch: _Optional[int] = ..., weights_version: _Optional[str] = ...) -> None: ...

class TensorPart(_message.Message):
    __slots__ = ("update", "tensor", "data", "crc32", "end")
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    update: TensorUpdate
    tensor: Tensor
    data: bytes
    crc32: int
    end: int
    def __init__(self, update: _Optional[_Union[TensorUpdate, _Mapping]] = ..., tensor: _Optional[_Union[Tensor, _Mapping]] = ..., data: _Optional[bytes] = ..., crc32: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class TensorUpdate(_message.Message):
    __slots__ = ("version", "base_version", "running", "timeout_s")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    version: str
    base_version: str
    running: str
    timeout_s: float
    def __init__(self, version: _Optional[str] = ..., base_version: _Optional[str] = ..., running: _Optional[str] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("name", "dtype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("rank", "level", "code", "message")
    RANK_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    rank: int
    level: int
    code: str
    message: str
    def __init__(self, rank: _Optional[int] = ..., level: _Optional[int] = ..., code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class ReportResponse(_message.Message):
    __slots__ = ("action",)
    ACTION_FIELD_NUMBER: _ClassVar[int]
    action: str
    def __init__(self, action: _Optional[str] = ...) -> None: ...
