from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HostCommands(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[HostCommand]
    def __init__(self, items: _Optional[_Iterable[_Union[HostCommand, _Mapping]]] = ...) -> None: ...

class HostCommand(_message.Message):
    __slots__ = ("links", "command", "step", "accepted", "closed", "ids")
    LINKS_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    links: _containers.RepeatedScalarFieldContainer[int]
    command: Command
    step: HostStep
    accepted: bool
    closed: str
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, links: _Optional[_Iterable[int]] = ..., command: _Optional[_Union[Command, _Mapping]] = ..., step: _Optional[_Union[HostStep, _Mapping]] = ..., accepted: bool = ..., closed: _Optional[str] = ..., ids: _Optional[_Iterable[int]] = ...) -> None: ...

class HostStep(_message.Message):
    __slots__ = ("epoch", "step", "bucket", "after", "decode", "tiles", "page_size", "max_pages", "counts", "requests", "words", "numbers", "extras", "skip_drafts")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    TILES_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_PAGES_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WORDS_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    EXTRAS_FIELD_NUMBER: _ClassVar[int]
    SKIP_DRAFTS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    bucket: int
    after: int
    decode: int
    tiles: int
    page_size: int
    max_pages: int
    counts: bytes
    requests: _containers.RepeatedScalarFieldContainer[str]
    words: bytes
    numbers: bytes
    extras: _containers.RepeatedCompositeFieldContainer[StepExtras]
    skip_drafts: bool
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., bucket: _Optional[int] = ..., after: _Optional[int] = ..., decode: _Optional[int] = ..., tiles: _Optional[int] = ..., page_size: _Optional[int] = ..., max_pages: _Optional[int] = ..., counts: _Optional[bytes] = ..., requests: _Optional[_Iterable[str]] = ..., words: _Optional[bytes] = ..., numbers: _Optional[bytes] = ..., extras: _Optional[_Iterable[_Union[StepExtras, _Mapping]]] = ..., skip_drafts: bool = ...) -> None: ...

class StepExtras(_message.Message):
    __slots__ = ("index", "adjustments", "targets", "full", "snapshots")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ADJUSTMENTS_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    FULL_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    index: int
    adjustments: _containers.RepeatedCompositeFieldContainer[RowAdjustment]
    targets: _containers.RepeatedCompositeFieldContainer[TileTargets]
    full: FullPages
    snapshots: bytes
    def __init__(self, index: _Optional[int] = ..., adjustments: _Optional[_Iterable[_Union[RowAdjustment, _Mapping]]] = ..., targets: _Optional[_Iterable[_Union[TileTargets, _Mapping]]] = ..., full: _Optional[_Union[FullPages, _Mapping]] = ..., snapshots: _Optional[bytes] = ...) -> None: ...

class HostReport(_message.Message):
    __slots__ = ("hello", "items", "beats", "expert_load")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    BEATS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_LOAD_FIELD_NUMBER: _ClassVar[int]
    hello: HostHello
    items: _containers.RepeatedCompositeFieldContainer[HostItem]
    beats: _containers.RepeatedScalarFieldContainer[int]
    expert_load: bytes
    def __init__(self, hello: _Optional[_Union[HostHello, _Mapping]] = ..., items: _Optional[_Iterable[_Union[HostItem, _Mapping]]] = ..., beats: _Optional[_Iterable[int]] = ..., expert_load: _Optional[bytes] = ...) -> None: ...

class HostHello(_message.Message):
    __slots__ = ("token", "host", "build", "oldest", "newest")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    BUILD_FIELD_NUMBER: _ClassVar[int]
    OLDEST_FIELD_NUMBER: _ClassVar[int]
    NEWEST_FIELD_NUMBER: _ClassVar[int]
    token: str
    host: str
    build: str
    oldest: int
    newest: int
    def __init__(self, token: _Optional[str] = ..., host: _Optional[str] = ..., build: _Optional[str] = ..., oldest: _Optional[int] = ..., newest: _Optional[int] = ...) -> None: ...

class HostItem(_message.Message):
    __slots__ = ("link", "report", "step_done", "gone")
    LINK_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    STEP_DONE_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    link: int
    report: Report
    step_done: HostStepDone
    gone: str
    def __init__(self, link: _Optional[int] = ..., report: _Optional[_Union[Report, _Mapping]] = ..., step_done: _Optional[_Union[HostStepDone, _Mapping]] = ..., gone: _Optional[str] = ...) -> None: ...

class HostStepDone(_message.Message):
    __slots__ = ("epoch", "step", "links", "tokens", "logprobs", "times", "compiles", "detailed", "details")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    COMPILES_FIELD_NUMBER: _ClassVar[int]
    DETAILED_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    links: _containers.RepeatedScalarFieldContainer[int]
    tokens: bytes
    logprobs: bytes
    times: bytes
    compiles: _containers.RepeatedScalarFieldContainer[int]
    detailed: _containers.RepeatedScalarFieldContainer[int]
    details: _containers.RepeatedCompositeFieldContainer[StepDone]
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., links: _Optional[_Iterable[int]] = ..., tokens: _Optional[bytes] = ..., logprobs: _Optional[bytes] = ..., times: _Optional[bytes] = ..., compiles: _Optional[_Iterable[int]] = ..., detailed: _Optional[_Iterable[int]] = ..., details: _Optional[_Iterable[_Union[StepDone, _Mapping]]] = ...) -> None: ...

class Command(_message.Message):
    __slots__ = ("id", "configure", "join", "compile", "prepare", "connect", "adopt", "step", "abort", "stop", "read_cache", "write_cache", "inspect", "damage", "seat", "hold", "restore_cache", "read_weights", "write_weights", "keep_parity", "stage_weights", "ping")
    ID_FIELD_NUMBER: _ClassVar[int]
    CONFIGURE_FIELD_NUMBER: _ClassVar[int]
    JOIN_FIELD_NUMBER: _ClassVar[int]
    COMPILE_FIELD_NUMBER: _ClassVar[int]
    PREPARE_FIELD_NUMBER: _ClassVar[int]
    CONNECT_FIELD_NUMBER: _ClassVar[int]
    ADOPT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    READ_CACHE_FIELD_NUMBER: _ClassVar[int]
    WRITE_CACHE_FIELD_NUMBER: _ClassVar[int]
    INSPECT_FIELD_NUMBER: _ClassVar[int]
    DAMAGE_FIELD_NUMBER: _ClassVar[int]
    SEAT_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    RESTORE_CACHE_FIELD_NUMBER: _ClassVar[int]
    READ_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    WRITE_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    KEEP_PARITY_FIELD_NUMBER: _ClassVar[int]
    STAGE_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    id: int
    configure: Configure
    join: Join
    compile: Compile
    prepare: Prepare
    connect: Connect
    adopt: Adopt
    step: Step
    abort: Abort
    stop: Stop
    read_cache: ReadCache
    write_cache: WriteCache
    inspect: Inspect
    damage: Damage
    seat: Seat
    hold: Hold
    restore_cache: RestoreCache
    read_weights: ReadWeights
    write_weights: WriteWeights
    keep_parity: KeepParity
    stage_weights: StageWeights
    ping: Ping
    def __init__(self, id: _Optional[int] = ..., configure: _Optional[_Union[Configure, _Mapping]] = ..., join: _Optional[_Union[Join, _Mapping]] = ..., compile: _Optional[_Union[Compile, _Mapping]] = ..., prepare: _Optional[_Union[Prepare, _Mapping]] = ..., connect: _Optional[_Union[Connect, _Mapping]] = ..., adopt: _Optional[_Union[Adopt, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., stop: _Optional[_Union[Stop, _Mapping]] = ..., read_cache: _Optional[_Union[ReadCache, _Mapping]] = ..., write_cache: _Optional[_Union[WriteCache, _Mapping]] = ..., inspect: _Optional[_Union[Inspect, _Mapping]] = ..., damage: _Optional[_Union[Damage, _Mapping]] = ..., seat: _Optional[_Union[Seat, _Mapping]] = ..., hold: _Optional[_Union[Hold, _Mapping]] = ..., restore_cache: _Optional[_Union[RestoreCache, _Mapping]] = ..., read_weights: _Optional[_Union[ReadWeights, _Mapping]] = ..., write_weights: _Optional[_Union[WriteWeights, _Mapping]] = ..., keep_parity: _Optional[_Union[KeepParity, _Mapping]] = ..., stage_weights: _Optional[_Union[StageWeights, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ...) -> None: ...

class Configure(_message.Message):
    __slots__ = ("model_config", "store", "executables", "page_size", "pages", "max_pages", "buckets", "collective_timeout_s", "one_machine", "experts_only", "cache_copy", "tell_copies", "tensor", "shard", "weights", "drafts", "snapshots")
    MODEL_CONFIG_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    EXECUTABLES_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    MAX_PAGES_FIELD_NUMBER: _ClassVar[int]
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    COLLECTIVE_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    ONE_MACHINE_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_ONLY_FIELD_NUMBER: _ClassVar[int]
    CACHE_COPY_FIELD_NUMBER: _ClassVar[int]
    TELL_COPIES_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    DRAFTS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    model_config: str
    store: str
    executables: str
    page_size: int
    pages: int
    max_pages: int
    buckets: _containers.RepeatedCompositeFieldContainer[Bucket]
    collective_timeout_s: int
    one_machine: bool
    experts_only: bool
    cache_copy: str
    tell_copies: bool
    tensor: int
    shard: int
    weights: int
    drafts: int
    snapshots: int
    def __init__(self, model_config: _Optional[str] = ..., store: _Optional[str] = ..., executables: _Optional[str] = ..., page_size: _Optional[int] = ..., pages: _Optional[int] = ..., max_pages: _Optional[int] = ..., buckets: _Optional[_Iterable[_Union[Bucket, _Mapping]]] = ..., collective_timeout_s: _Optional[int] = ..., one_machine: bool = ..., experts_only: bool = ..., cache_copy: _Optional[str] = ..., tell_copies: bool = ..., tensor: _Optional[int] = ..., shard: _Optional[int] = ..., weights: _Optional[int] = ..., drafts: _Optional[int] = ..., snapshots: _Optional[int] = ...) -> None: ...

class WeightsVersion(_message.Message):
    __slots__ = ("number", "store")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    number: int
    store: str
    def __init__(self, number: _Optional[int] = ..., store: _Optional[str] = ...) -> None: ...

class StageWeights(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: WeightsVersion
    def __init__(self, version: _Optional[_Union[WeightsVersion, _Mapping]] = ...) -> None: ...

class Bucket(_message.Message):
    __slots__ = ("decode", "tiles")
    DECODE_FIELD_NUMBER: _ClassVar[int]
    TILES_FIELD_NUMBER: _ClassVar[int]
    decode: int
    tiles: int
    def __init__(self, decode: _Optional[int] = ..., tiles: _Optional[int] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Join(_message.Message):
    __slots__ = ("generation", "address", "members", "pages_used", "seats", "processes")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    PAGES_USED_FIELD_NUMBER: _ClassVar[int]
    SEATS_FIELD_NUMBER: _ClassVar[int]
    PROCESSES_FIELD_NUMBER: _ClassVar[int]
    generation: int
    address: str
    members: _containers.RepeatedScalarFieldContainer[int]
    pages_used: int
    seats: _containers.RepeatedScalarFieldContainer[int]
    processes: int
    def __init__(self, generation: _Optional[int] = ..., address: _Optional[str] = ..., members: _Optional[_Iterable[int]] = ..., pages_used: _Optional[int] = ..., seats: _Optional[_Iterable[int]] = ..., processes: _Optional[int] = ...) -> None: ...

class Seat(_message.Message):
    __slots__ = ("rank", "process")
    RANK_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    process: int
    def __init__(self, rank: _Optional[int] = ..., process: _Optional[int] = ...) -> None: ...

class Hold(_message.Message):
    __slots__ = ("slots_per_rank", "slots", "weights")
    SLOTS_PER_RANK_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    slots_per_rank: int
    slots: bytes
    weights: WeightsVersion
    def __init__(self, slots_per_rank: _Optional[int] = ..., slots: _Optional[bytes] = ..., weights: _Optional[_Union[WeightsVersion, _Mapping]] = ...) -> None: ...

class MeshShape(_message.Message):
    __slots__ = ("ranks", "runs", "slots", "attention")
    RANKS_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    ranks: _containers.RepeatedScalarFieldContainer[int]
    runs: _containers.RepeatedScalarFieldContainer[int]
    slots: int
    attention: int
    def __init__(self, ranks: _Optional[_Iterable[int]] = ..., runs: _Optional[_Iterable[int]] = ..., slots: _Optional[int] = ..., attention: _Optional[int] = ...) -> None: ...

class Compile(_message.Message):
    __slots__ = ("mesh",)
    MESH_FIELD_NUMBER: _ClassVar[int]
    mesh: MeshShape
    def __init__(self, mesh: _Optional[_Union[MeshShape, _Mapping]] = ...) -> None: ...

class Prepare(_message.Message):
    __slots__ = ("mesh", "urgent")
    MESH_FIELD_NUMBER: _ClassVar[int]
    URGENT_FIELD_NUMBER: _ClassVar[int]
    mesh: MeshShape
    urgent: bool
    def __init__(self, mesh: _Optional[_Union[MeshShape, _Mapping]] = ..., urgent: bool = ...) -> None: ...

class Connect(_message.Message):
    __slots__ = ("mesh", "warm", "exchange", "number")
    MESH_FIELD_NUMBER: _ClassVar[int]
    WARM_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    mesh: MeshShape
    warm: bool
    exchange: str
    number: int
    def __init__(self, mesh: _Optional[_Union[MeshShape, _Mapping]] = ..., warm: bool = ..., exchange: _Optional[str] = ..., number: _Optional[int] = ...) -> None: ...

class Adopt(_message.Message):
    __slots__ = ("epoch", "mesh", "slots", "expert_to_slot", "cache_copy", "tell_copies", "mates", "weights")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MESH_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_TO_SLOT_FIELD_NUMBER: _ClassVar[int]
    CACHE_COPY_FIELD_NUMBER: _ClassVar[int]
    TELL_COPIES_FIELD_NUMBER: _ClassVar[int]
    MATES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    mesh: MeshShape
    slots: bytes
    expert_to_slot: bytes
    cache_copy: str
    tell_copies: bool
    mates: _containers.RepeatedScalarFieldContainer[int]
    weights: WeightsVersion
    def __init__(self, epoch: _Optional[int] = ..., mesh: _Optional[_Union[MeshShape, _Mapping]] = ..., slots: _Optional[bytes] = ..., expert_to_slot: _Optional[bytes] = ..., cache_copy: _Optional[str] = ..., tell_copies: bool = ..., mates: _Optional[_Iterable[int]] = ..., weights: _Optional[_Union[WeightsVersion, _Mapping]] = ...) -> None: ...

class ReadCache(_message.Message):
    __slots__ = ("pages", "first", "count", "state")
    PAGES_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    pages: _containers.RepeatedScalarFieldContainer[int]
    first: int
    count: int
    state: int
    def __init__(self, pages: _Optional[_Iterable[int]] = ..., first: _Optional[int] = ..., count: _Optional[int] = ..., state: _Optional[int] = ...) -> None: ...

class WriteCache(_message.Message):
    __slots__ = ("pages", "first", "count", "rows", "tokens", "state")
    PAGES_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    pages: _containers.RepeatedScalarFieldContainer[int]
    first: int
    count: int
    rows: bytes
    tokens: bytes
    state: int
    def __init__(self, pages: _Optional[_Iterable[int]] = ..., first: _Optional[int] = ..., count: _Optional[int] = ..., rows: _Optional[bytes] = ..., tokens: _Optional[bytes] = ..., state: _Optional[int] = ...) -> None: ...

class RestoreCache(_message.Message):
    __slots__ = ("pages", "first", "count", "tokens", "cache_copy", "from_pages", "rows")
    PAGES_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHE_COPY_FIELD_NUMBER: _ClassVar[int]
    FROM_PAGES_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    pages: _containers.RepeatedScalarFieldContainer[int]
    first: int
    count: int
    tokens: bytes
    cache_copy: str
    from_pages: _containers.RepeatedScalarFieldContainer[int]
    rows: bytes
    def __init__(self, pages: _Optional[_Iterable[int]] = ..., first: _Optional[int] = ..., count: _Optional[int] = ..., tokens: _Optional[bytes] = ..., cache_copy: _Optional[str] = ..., from_pages: _Optional[_Iterable[int]] = ..., rows: _Optional[bytes] = ...) -> None: ...

class Weights(_message.Message):
    __slots__ = ("layer", "experts", "parity")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    layer: int
    experts: _containers.RepeatedScalarFieldContainer[int]
    parity: bool
    def __init__(self, layer: _Optional[int] = ..., experts: _Optional[_Iterable[int]] = ..., parity: bool = ...) -> None: ...

class ReadWeights(_message.Message):
    __slots__ = ("of", "first", "count")
    OF_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    of: Weights
    first: int
    count: int
    def __init__(self, of: _Optional[_Union[Weights, _Mapping]] = ..., first: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class WriteWeights(_message.Message):
    __slots__ = ("of", "first", "size", "rows", "checksums")
    OF_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    of: Weights
    first: int
    size: int
    rows: bytes
    checksums: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, of: _Optional[_Union[Weights, _Mapping]] = ..., first: _Optional[int] = ..., size: _Optional[int] = ..., rows: _Optional[bytes] = ..., checksums: _Optional[_Iterable[int]] = ...) -> None: ...

class KeepParity(_message.Message):
    __slots__ = ("layer", "parities")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    PARITIES_FIELD_NUMBER: _ClassVar[int]
    layer: int
    parities: _containers.RepeatedCompositeFieldContainer[Weights]
    def __init__(self, layer: _Optional[int] = ..., parities: _Optional[_Iterable[_Union[Weights, _Mapping]]] = ...) -> None: ...

class Inspect(_message.Message):
    __slots__ = ("first", "count")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    first: int
    count: int
    def __init__(self, first: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class Damage(_message.Message):
    __slots__ = ("layer", "slot", "nan")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    NAN_FIELD_NUMBER: _ClassVar[int]
    layer: int
    slot: int
    nan: bool
    def __init__(self, layer: _Optional[int] = ..., slot: _Optional[int] = ..., nan: bool = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("epoch", "step", "bucket", "inputs", "adjustments", "targets", "full", "after", "sources", "skip_drafts")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    ADJUSTMENTS_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    FULL_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    SKIP_DRAFTS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    bucket: int
    inputs: bytes
    adjustments: _containers.RepeatedCompositeFieldContainer[RowAdjustment]
    targets: _containers.RepeatedCompositeFieldContainer[TileTargets]
    full: FullPages
    after: int
    sources: bytes
    skip_drafts: bool
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., bucket: _Optional[int] = ..., inputs: _Optional[bytes] = ..., adjustments: _Optional[_Iterable[_Union[RowAdjustment, _Mapping]]] = ..., targets: _Optional[_Iterable[_Union[TileTargets, _Mapping]]] = ..., full: _Optional[_Union[FullPages, _Mapping]] = ..., after: _Optional[int] = ..., sources: _Optional[bytes] = ..., skip_drafts: bool = ...) -> None: ...

class FullPages(_message.Message):
    __slots__ = ("pages", "keys", "snapshots", "snapshot_keys")
    PAGES_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_KEYS_FIELD_NUMBER: _ClassVar[int]
    pages: bytes
    keys: bytes
    snapshots: bytes
    snapshot_keys: bytes
    def __init__(self, pages: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., snapshots: _Optional[bytes] = ..., snapshot_keys: _Optional[bytes] = ...) -> None: ...

class RowAdjustment(_message.Message):
    __slots__ = ("segment", "tokens", "add", "seen", "repetition", "allowed")
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ADD_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    REPETITION_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_FIELD_NUMBER: _ClassVar[int]
    segment: int
    tokens: bytes
    add: bytes
    seen: bytes
    repetition: float
    allowed: bytes
    def __init__(self, segment: _Optional[int] = ..., tokens: _Optional[bytes] = ..., add: _Optional[bytes] = ..., seen: _Optional[bytes] = ..., repetition: _Optional[float] = ..., allowed: _Optional[bytes] = ...) -> None: ...

class TileTargets(_message.Message):
    __slots__ = ("row", "targets")
    ROW_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    row: int
    targets: bytes
    def __init__(self, row: _Optional[int] = ..., targets: _Optional[bytes] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("epoch", "connecting", "links")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CONNECTING_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    connecting: int
    links: bool
    def __init__(self, epoch: _Optional[int] = ..., connecting: _Optional[int] = ..., links: bool = ...) -> None: ...

class Stop(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Report(_message.Message):
    __slots__ = ("rank", "hello", "heartbeat", "done", "failed", "step_done", "step_failed", "copied", "raised")
    RANK_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    STEP_DONE_FIELD_NUMBER: _ClassVar[int]
    STEP_FAILED_FIELD_NUMBER: _ClassVar[int]
    COPIED_FIELD_NUMBER: _ClassVar[int]
    RAISED_FIELD_NUMBER: _ClassVar[int]
    rank: int
    hello: Hello
    heartbeat: Heartbeat
    done: Done
    failed: Failed
    step_done: StepDone
    step_failed: StepFailed
    copied: Copied
    raised: Raised
    def __init__(self, rank: _Optional[int] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., step_done: _Optional[_Union[StepDone, _Mapping]] = ..., step_failed: _Optional[_Union[StepFailed, _Mapping]] = ..., copied: _Optional[_Union[Copied, _Mapping]] = ..., raised: _Optional[_Union[Raised, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("pid", "token", "cache_copy", "build", "oldest", "newest")
    PID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    CACHE_COPY_FIELD_NUMBER: _ClassVar[int]
    BUILD_FIELD_NUMBER: _ClassVar[int]
    OLDEST_FIELD_NUMBER: _ClassVar[int]
    NEWEST_FIELD_NUMBER: _ClassVar[int]
    pid: int
    token: str
    cache_copy: str
    build: str
    oldest: int
    newest: int
    def __init__(self, pid: _Optional[int] = ..., token: _Optional[str] = ..., cache_copy: _Optional[str] = ..., build: _Optional[str] = ..., oldest: _Optional[int] = ..., newest: _Optional[int] = ...) -> None: ...

class Held(_message.Message):
    __slots__ = ("epoch", "generation", "full", "serves", "weights")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    FULL_FIELD_NUMBER: _ClassVar[int]
    SERVES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    generation: int
    full: FullPages
    serves: bool
    weights: int
    def __init__(self, epoch: _Optional[int] = ..., generation: _Optional[int] = ..., full: _Optional[_Union[FullPages, _Mapping]] = ..., serves: bool = ..., weights: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Done(_message.Message):
    __slots__ = ("id", "milliseconds", "compiles", "experts_loaded", "compiled", "missing", "trouble", "rows", "damaged", "shares_memory", "size", "checksums", "held")
    ID_FIELD_NUMBER: _ClassVar[int]
    MILLISECONDS_FIELD_NUMBER: _ClassVar[int]
    COMPILES_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_LOADED_FIELD_NUMBER: _ClassVar[int]
    COMPILED_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    TROUBLE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    SHARES_MEMORY_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    id: int
    milliseconds: float
    compiles: int
    experts_loaded: int
    compiled: int
    missing: _containers.RepeatedCompositeFieldContainer[ExpertSlot]
    trouble: str
    rows: bytes
    damaged: bool
    shares_memory: bool
    size: int
    checksums: _containers.RepeatedScalarFieldContainer[int]
    held: Held
    def __init__(self, id: _Optional[int] = ..., milliseconds: _Optional[float] = ..., compiles: _Optional[int] = ..., experts_loaded: _Optional[int] = ..., compiled: _Optional[int] = ..., missing: _Optional[_Iterable[_Union[ExpertSlot, _Mapping]]] = ..., trouble: _Optional[str] = ..., rows: _Optional[bytes] = ..., damaged: bool = ..., shares_memory: bool = ..., size: _Optional[int] = ..., checksums: _Optional[_Iterable[int]] = ..., held: _Optional[_Union[Held, _Mapping]] = ...) -> None: ...

class ExpertSlot(_message.Message):
    __slots__ = ("layer", "slot", "expert")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    layer: int
    slot: int
    expert: int
    def __init__(self, layer: _Optional[int] = ..., slot: _Optional[int] = ..., expert: _Optional[int] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("id", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: int
    error: str
    def __init__(self, id: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...

class StepDone(_message.Message):
    __slots__ = ("epoch", "step", "tokens", "logprobs", "expert_load", "program_ms", "total_ms", "compiles", "own_ms", "likeliest", "scores", "drafts")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_LOAD_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_MS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MS_FIELD_NUMBER: _ClassVar[int]
    COMPILES_FIELD_NUMBER: _ClassVar[int]
    OWN_MS_FIELD_NUMBER: _ClassVar[int]
    LIKELIEST_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    DRAFTS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    tokens: bytes
    logprobs: bytes
    expert_load: bytes
    program_ms: float
    total_ms: float
    compiles: int
    own_ms: float
    likeliest: Likeliest
    scores: _containers.RepeatedCompositeFieldContainer[TileScores]
    drafts: bytes
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., tokens: _Optional[bytes] = ..., logprobs: _Optional[bytes] = ..., expert_load: _Optional[bytes] = ..., program_ms: _Optional[float] = ..., total_ms: _Optional[float] = ..., compiles: _Optional[int] = ..., own_ms: _Optional[float] = ..., likeliest: _Optional[_Union[Likeliest, _Mapping]] = ..., scores: _Optional[_Iterable[_Union[TileScores, _Mapping]]] = ..., drafts: _Optional[bytes] = ...) -> None: ...

class Likeliest(_message.Message):
    __slots__ = ("tokens", "logprobs")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    tokens: bytes
    logprobs: bytes
    def __init__(self, tokens: _Optional[bytes] = ..., logprobs: _Optional[bytes] = ...) -> None: ...

class TileScores(_message.Message):
    __slots__ = ("logprobs", "likeliest")
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LIKELIEST_FIELD_NUMBER: _ClassVar[int]
    logprobs: bytes
    likeliest: Likeliest
    def __init__(self, logprobs: _Optional[bytes] = ..., likeliest: _Optional[_Union[Likeliest, _Mapping]] = ...) -> None: ...

class Copied(_message.Message):
    __slots__ = ("entries", "tokens", "positions", "rows", "sealed")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    entries: bytes
    tokens: bytes
    positions: bytes
    rows: bytes
    sealed: int
    def __init__(self, entries: _Optional[bytes] = ..., tokens: _Optional[bytes] = ..., positions: _Optional[bytes] = ..., rows: _Optional[bytes] = ..., sealed: _Optional[int] = ...) -> None: ...

class Raised(_message.Message):
    __slots__ = ("error", "trace")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    error: str
    trace: str
    def __init__(self, error: _Optional[str] = ..., trace: _Optional[str] = ...) -> None: ...

class StepFailed(_message.Message):
    __slots__ = ("epoch", "step", "error", "non_finite_rows", "exchange")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    NON_FINITE_ROWS_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    error: str
    non_finite_rows: _containers.RepeatedScalarFieldContainer[int]
    exchange: bool
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., error: _Optional[str] = ..., non_finite_rows: _Optional[_Iterable[int]] = ..., exchange: bool = ...) -> None: ...

class PlaceReport(_message.Message):
    __slots__ = ("place", "prepared", "started", "ended", "condition")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    PREPARED_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    CONDITION_FIELD_NUMBER: _ClassVar[int]
    place: Place
    prepared: ModelPrepared
    started: RankStarted
    ended: RankEnded
    condition: RankCondition
    def __init__(self, place: _Optional[_Union[Place, _Mapping]] = ..., prepared: _Optional[_Union[ModelPrepared, _Mapping]] = ..., started: _Optional[_Union[RankStarted, _Mapping]] = ..., ended: _Optional[_Union[RankEnded, _Mapping]] = ..., condition: _Optional[_Union[RankCondition, _Mapping]] = ...) -> None: ...

class Place(_message.Message):
    __slots__ = ("token", "host", "rack", "build", "left")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    RACK_FIELD_NUMBER: _ClassVar[int]
    BUILD_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    token: str
    host: str
    rack: str
    build: str
    left: LeftRank
    def __init__(self, token: _Optional[str] = ..., host: _Optional[str] = ..., rack: _Optional[str] = ..., build: _Optional[str] = ..., left: _Optional[_Union[LeftRank, _Mapping]] = ...) -> None: ...

class LeftRank(_message.Message):
    __slots__ = ("incarnation", "rank", "token", "pid")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    rank: int
    token: str
    pid: int
    def __init__(self, incarnation: _Optional[int] = ..., rank: _Optional[int] = ..., token: _Optional[str] = ..., pid: _Optional[int] = ...) -> None: ...

class ModelPrepared(_message.Message):
    __slots__ = ("error", "config", "content", "store", "executables", "disk", "numerics")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    EXECUTABLES_FIELD_NUMBER: _ClassVar[int]
    DISK_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    error: str
    config: str
    content: str
    store: str
    executables: str
    disk: str
    numerics: str
    def __init__(self, error: _Optional[str] = ..., config: _Optional[str] = ..., content: _Optional[str] = ..., store: _Optional[str] = ..., executables: _Optional[str] = ..., disk: _Optional[str] = ..., numerics: _Optional[str] = ...) -> None: ...

class RankStarted(_message.Message):
    __slots__ = ("incarnation", "pid")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    pid: int
    def __init__(self, incarnation: _Optional[int] = ..., pid: _Optional[int] = ...) -> None: ...

class RankCondition(_message.Message):
    __slots__ = ("incarnation", "state", "run_delay_s")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RUN_DELAY_S_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    state: str
    run_delay_s: float
    def __init__(self, incarnation: _Optional[int] = ..., state: _Optional[str] = ..., run_delay_s: _Optional[float] = ...) -> None: ...

class RankEnded(_message.Message):
    __slots__ = ("incarnation", "code", "said")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    SAID_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    code: int
    said: str
    def __init__(self, incarnation: _Optional[int] = ..., code: _Optional[int] = ..., said: _Optional[str] = ...) -> None: ...

class PlaceOrder(_message.Message):
    __slots__ = ("prepare", "start", "signal")
    PREPARE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    prepare: PrepareModel
    start: StartRank
    signal: SignalRank
    def __init__(self, prepare: _Optional[_Union[PrepareModel, _Mapping]] = ..., start: _Optional[_Union[StartRank, _Mapping]] = ..., signal: _Optional[_Union[SignalRank, _Mapping]] = ...) -> None: ...

class PrepareModel(_message.Message):
    __slots__ = ("model", "data_type", "in_place", "dense", "mtp", "kv_cache_type")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    IN_PLACE_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    MTP_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_TYPE_FIELD_NUMBER: _ClassVar[int]
    model: str
    data_type: str
    in_place: bool
    dense: str
    mtp: bool
    kv_cache_type: str
    def __init__(self, model: _Optional[str] = ..., data_type: _Optional[str] = ..., in_place: bool = ..., dense: _Optional[str] = ..., mtp: bool = ..., kv_cache_type: _Optional[str] = ...) -> None: ...

class StartRank(_message.Message):
    __slots__ = ("incarnation", "rank", "token", "own_stream")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    OWN_STREAM_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    rank: int
    token: str
    own_stream: bool
    def __init__(self, incarnation: _Optional[int] = ..., rank: _Optional[int] = ..., token: _Optional[str] = ..., own_stream: bool = ...) -> None: ...

class SignalRank(_message.Message):
    __slots__ = ("incarnation", "name")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    name: str
    def __init__(self, incarnation: _Optional[int] = ..., name: _Optional[str] = ...) -> None: ...
