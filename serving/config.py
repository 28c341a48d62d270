"""The server's settings: frozen, validated, each default written once. Sources: TOML, environment, flags.

A field's metadata is its one description: the flag's help, the table in the documentation.
"""

import dataclasses
import difflib
import json
import os
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from planner.roles import SWITCHES
from planner.shape import ARCHITECTURES
from serving.errors import InvalidRequest
from serving.policy import POLICIES

PREFIX = "MOEJAX_"
OTHER_VARIABLES = frozenset(
    {"SERVER", "API_KEY", "CA", "CLIENT_CERT", "CLIENT_KEY", "CACHE", "CONFIG", "KEYS", "TOKEN_FILE"}
)
"""MOEJAX_ variables that are not settings of a server."""
_FOREIGN = re.compile(r"LINK_\w+|(\w+_)?SERVICE_(HOST|PORT)(_\w+)?|PORT(_\d+_TCP.*)?|TEST_\w+|COMPLETE|\w+_COMPLETE")
"""What ranks are told, what Kubernetes tells every pod of a service called moejax, and shell completion."""
PROTECTIONS = ("auto", "memory", "stream", "off")
LAUNCHERS = ("local", "join", "ray")
DATA_TYPES = ("float32", "bfloat16", "int8")
DENSE = ("whole", "divided")
_ENVIRONMENT_CLOSENESS = 0.75


def setting(default: Any, text: str, *, choices: tuple[str, ...] = ()) -> Any:
    """A field with its default and what it is for."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """One server. Ports of 0 take a free one; `slots_per_rank` None lets the planner choose; no `buckets` are those
    that the counts of earlier steps say are best."""

    model: str = setting("smollm2-moe", "A known model (`moejax models`) or a model folder.")
    data_type: str = setting(
        "float32", "How ranks hold matrices; int8 has a scale for each output.", choices=DATA_TYPES
    )
    dense: str = setting(
        "whole",
        "Dense layers are whole on every rank, or divided into shards that ranks hold as experts.",
        choices=DENSE,
    )
    in_place: bool = setting(False, "Read a published folder where it lies; otherwise it is converted once.")
    ranks: int = setting(4, "Rank processes, one per device.")
    arch: str = setting("collocated", "Every rank attends and holds experts, or each does one.", choices=ARCHITECTURES)
    attention: int | None = setting(
        None, "With arch disaggregated: ranks that attend; the planner chooses if left out."
    )
    experts: int | None = setting(None, "With arch disaggregated: ranks that hold experts; the others when left out.")
    tensor: int = setting(
        1, "Ranks of a host that attend together, each with a share of the heads; with arch collocated."
    )
    role_switch: str = setting(
        "auto",
        "Ranks that attend take the place of lost expert ranks: when too few are left, or always.",
        choices=SWITCHES,
    )
    host: str = setting("127.0.0.1", "Address to listen on; 0.0.0.0 for all. Anything but loopback wants API keys.")
    grpc_port: int = setting(50051, "Port of gRPC; 0 takes a free one.")
    http_port: int = setting(8000, "Port of HTTP; 0 takes a free one.")
    hosts: int = setting(1, "Hosts the ranks count as spread over, for placement and for the loss of a whole host.")
    launcher: str = setting(
        "local", "Who starts ranks: this server, hosts that join it, or Ray (needs moejax[ray]).", choices=LAUNCHERS
    )
    rank_listen: str = setting("127.0.0.1:50052", "host:port that ranks elsewhere dial (with launcher join or ray).")
    rank_tokens: str | None = setting(None, "File of join tokens (`moejax tokens add`) that let ranks in.")
    rank_tls_cert: str | None = setting(None, "Certificate chain (PEM) of rank-listen; needs --rank-tls-key.")
    rank_tls_key: str | None = setting(None, "Private key (PEM) of --rank-tls-cert.")
    rank_tls_client_ca: str | None = setting(None, "Ranks must show a certificate of this authority (mutual TLS).")
    rank_plaintext: bool = setting(False, "Let ranks dial in over a network without TLS.")
    ray_address: str = setting("auto", "Ray cluster that starts ranks, with launcher ray.")
    chaos: bool = setting(False, "Let clients kill ranks.")
    operate: bool = setting(False, "Let callers on this machine drain, scale, pause and report device errors.")
    device_errors: str | None = setting(None, "File to which a device plugin appends errors, one JSON object a line.")
    on_lost_expert: str = setting("wait", "While an expert that no rank holds is loaded.", choices=POLICIES)
    lost_expert_bound: float = setting(0.05, "With on-lost-expert auto: mask below this share of the traffic.")
    parity: int = setting(
        0,
        "Experts of so many ranks share one parity in host memory of another: with it lost experts come back without "
        "the store. 0 is none.",
    )
    scrub_s: float = setting(300.0, "Seconds in which every weight is compared with its checksum once; 0 never.")
    drain_slow: bool = setting(False, "Drain and replace ranks that are slow for long, instead of only telling.")
    slow_factor: float = setting(3.0, "Slow: so many times the others' time for a rank's own part of the steps.")
    lookahead: bool = setting(True, "Make a step while the one before it runs; off: when its results are there.")
    slow_block_steps: int = setting(50, "Steps over which that is judged; eight slow blocks in a row are long.")
    restart: bool = setting(True, "Replace ranks that died.")
    slots_per_rank: int | None = setting(None, "Expert slots per layer; the planner chooses when left out.")
    survive: int = setting(1, "Losses that must not need new weight buffers.")
    lattice_depth: int = setting(3, "Losses of up to this many ranks are prepared beforehand.")
    max_queue: int = setting(1024, "Requests that may wait; more are refused at once.")
    max_context: int | None = setting(None, "Tokens of prompt and answer together; the model's when left out.")
    page_size: int = setting(32, "Tokens of a cache page.")
    pages_per_rank: int | None = setting(
        None,
        "Cache pages of a rank; left out: two contexts' worth, or 256 tokens for each row of a step in up to 128 MiB.",
    )
    buckets: tuple[tuple[int, int], ...] = setting(
        ((2, 0), (8, 0), (32, 0), (8, 2), (32, 8)),
        "Compiled steps: decode rows, prefill tiles of 32 (2,0;8,2); auto: chosen from what steps wanted until now.",
    )
    tiles_while_decoding: int = setting(
        2,
        "Prefill tiles in a step of which more requests decode than wait for their first token; more beside many rows.",
    )
    prefix_caching: bool = setting(True, "Keep the pages of prompts for later ones that begin the same.")
    protect_cache: str = setting(
        "auto",
        "Copies of caches that outlive their ranks: in memory of this machine, told over the ranks' streams, or none; "
        "auto is memory where there is enough and all ranks are here.",
        choices=PROTECTIONS,
    )
    heartbeat_s: float = setting(0.05, "Seconds between two heartbeats of a rank.")
    heartbeat_floor_s: float = setting(0.6, "Seconds without a heartbeat before a rank can be suspected.")
    step_floor_s: float = setting(10.0, "Seconds a step may take before its rank can be suspected.")
    start_timeout_s: float = setting(600.0, "Seconds until the server must be ready.")
    grace_s: float = setting(30.0, "Seconds a drain waits for running requests.")
    journal: str | None = setting(
        None, "Folder of the journal that a restarted front goes on from; off for none; one of its own when left out."
    )
    journal_sync_s: float = setting(1.0, "Seconds until the disk has what the journal says: a dead machine's bound.")
    supervise: bool = setting(True, "Start the front again when it dies; its requests go on.")
    resume_s: float = setting(60.0, "Seconds an answer can be resumed after its end.")
    api_keys: str | None = setting(None, "File of API keys (`moejax keys add`); without it nobody needs one.")
    tls_cert: str | None = setting(None, "Certificate chain (PEM) for HTTP and gRPC; needs --tls-key.")
    tls_key: str | None = setting(None, "Private key (PEM) of --tls-cert.")
    tls_client_ca: str | None = setting(None, "Clients must show a certificate of this authority (mutual TLS).")
    max_body_bytes: int = setting(4 << 20, "Size of an HTTP body or a gRPC message from a client.")
    max_header_bytes: int = setting(16 << 10, "Size of the headers or the metadata of a call.")
    max_prompt_tokens: int | None = setting(None, "Longer prompts are refused; the context is the bound otherwise.")
    max_streams: int = setting(4096, "Generating calls at once, HTTP and gRPC together.")
    slow_client_s: float = setting(60.0, "Seconds a client may take to send its body or to read what waits for it.")
    vllm_grpc: bool = setting(False, "Offer vllm.grpc.engine.VllmEngine beside our own gRPC (needs moejax[vllm]).")
    log_format: str = setting("text", "How logs are written to standard error.", choices=("text", "json"))
    log_level: str = setting("info", "What is logged.", choices=("debug", "info", "warning", "error"))
    otlp_endpoint: str | None = setting(None, "Send OpenTelemetry traces there over gRPC (needs moejax[otel]).")

    def __post_init__(self) -> None:
        if not 1 <= self.ranks <= 64:
            raise InvalidRequest(f"ranks is {self.ranks}. Choose between 1 and 64 local ranks.", param="ranks")
        self._check_sides()
        if self.in_place and self.dense == "divided":
            raise InvalidRequest(
                "dense is 'divided' with in_place: divided layers are written anew. Leave one of them out.",
                param="dense",
            )
        if not 0 <= self.survive < max(self.ranks, 1) and self.ranks > 1:
            raise InvalidRequest(
                f"survive is {self.survive} with {self.ranks} ranks. Choose between 0 and {self.ranks - 1}.",
                param="survive",
            )
        if not 0 <= self.parity < self.ranks:
            raise InvalidRequest(
                f"parity is {self.parity} with {self.ranks} ranks: each expert of a group is on a rank of its own, and "
                f"their parity on one more. Choose 0 to {self.ranks - 1}.",
                param="parity",
            )
        self._check_tensor()
        if not 1 <= self.hosts <= self.ranks:
            raise InvalidRequest(
                f"hosts is {self.hosts} with {self.ranks} ranks. Choose 1 to {self.ranks}.", param="hosts"
            )
        for name, least in (
            ("lost_expert_bound", 0.0),
            ("scrub_s", 0.0),
            ("slow_factor", 1.1),
            ("journal_sync_s", 0.0),
            ("resume_s", 0.0),
            ("slow_block_steps", 1),
        ):
            if not getattr(self, name) >= least:
                raise InvalidRequest(f"{name} is {getattr(self, name)}; it must be at least {least}.", param=name)
        for name in ("grpc_port", "http_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise InvalidRequest(f"{name} is {getattr(self, name)}. Choose 0 to 65535.", param=name)
        for field in dataclasses.fields(self):
            choices, value = field.metadata.get("choices", ()), getattr(self, field.name)
            if choices and value not in choices:
                raise InvalidRequest(
                    f"{field.name} is {value!r}. Choose one of {', '.join(choices)}.", param=field.name
                )
        for name in ("max_queue", "max_body_bytes", "max_header_bytes", "max_streams", "slow_client_s"):
            if getattr(self, name) <= 0:
                raise InvalidRequest(f"{name} is {getattr(self, name)}. Choose more than 0.", param=name)
        for prefix in ("", "rank_"):
            names = [f"{prefix}tls_{name}" for name in ("cert", "key", "client_ca")]
            cert, key, ca = (getattr(self, name) for name in names)
            if (cert is None) != (key is None):
                given, missing = names[:2] if cert else names[1::-1]
                raise InvalidRequest(f"{given} is given without {missing}. TLS needs both.", param=missing)
            if ca is not None and cert is None:
                raise InvalidRequest(
                    f"{names[2]} is given without {names[0]} and {names[1]}. Mutual TLS needs all three.",
                    param=names[0],
                )
        self._check_ranks_elsewhere()

    def _check_ranks_elsewhere(self) -> None:
        host, _, port = self.rank_listen.rpartition(":")
        if not (host and port.isdecimal() and int(port) <= 65535):
            raise InvalidRequest(f"rank_listen is {self.rank_listen!r}; it must be host:port.", param="rank_listen")
        if self.launcher == "local":
            return
        if self.launcher == "join" and self.rank_tokens is None:
            raise InvalidRequest(
                "launcher join needs rank_tokens: who may be a rank. Make one with `moejax tokens add NAME --file F`.",
                param="rank_tokens",
            )
        if self.rank_tls_cert is None and not self.rank_plaintext and not is_loopback(host):
            raise InvalidRequest(
                f"rank_listen is {self.rank_listen}, and without TLS anybody on the way can read what is served and "
                "take the join token. Give rank_tls_cert and rank_tls_key; or, on a network of yours, rank_plaintext.",
                param="rank_tls_cert",
            )
        if self.protect_cache == "memory":
            raise InvalidRequest(
                f"protect_cache is memory with launcher {self.launcher}: ranks elsewhere cannot write to the memory of "
                "this machine. Choose stream or off.",
                param="protect_cache",
            )
        if self.hosts != 1:
            raise InvalidRequest(
                f"hosts is {self.hosts} with launcher {self.launcher}: ranks elsewhere say themselves which host "
                "they are on. Leave it out.",
                param="hosts",
            )

    def _check_tensor(self) -> None:
        on_host = [self.host_of(rank) for rank in range(self.ranks)]
        for host in dict.fromkeys(on_host):
            if self.tensor < 1 or on_host.count(host) % self.tensor:
                raise InvalidRequest(
                    f"tensor is {self.tensor} with {on_host.count(host)} ranks on {host}: a group is of one host. "
                    f"Choose a divisor of {on_host.count(host)}.",
                    param="tensor",
                )
        if self.tensor == 1:
            return
        if self.arch != "collocated":
            raise InvalidRequest(
                f"tensor is {self.tensor} with arch {self.arch!r}: attention ranks of that attend alone. "
                "Set tensor to 1, or arch to collocated.",
                param="tensor",
            )

    def _check_sides(self) -> None:
        sides = {name: getattr(self, name) for name in ("attention", "experts") if getattr(self, name) is not None}
        if sides and self.arch != "disaggregated":
            raise InvalidRequest(
                f"{' and '.join(sides)} is given with arch {self.arch!r}. Set arch to disaggregated.", param="arch"
            )
        if len(sides) == 2 and self.ranks in (sum(sides.values()), type(self).ranks):
            object.__setattr__(self, "ranks", sum(sides.values()))
        open_sides = 2 - len(sides)
        if self.arch == "disaggregated" and (
            min(sides.values(), default=1) < 1
            or sum(sides.values()) + open_sides > self.ranks
            or (not open_sides and sum(sides.values()) != self.ranks)
        ):
            given = ", ".join(f"{name} {count}" for name, count in sides.items()) or "neither side"
            raise InvalidRequest(
                f"{given} of {self.ranks} ranks: each rank must attend or hold experts, and each side needs one. "
                "Give attention, experts or both.",
                param=next(iter(sides), "ranks"),
            )

    @property
    def loopback(self) -> bool:
        """Only this machine can reach the server."""
        return is_loopback(self.host)

    def host_of(self, rank: int) -> str:
        """The host a rank is on: ranks are dealt out in equal runs."""
        return "localhost" if self.hosts == 1 else f"host{rank * self.hosts // self.ranks}"

    @classmethod
    def load(cls, file: Path | None = None, environment: Mapping[str, str] = os.environ, **flags: Any) -> Self:
        """Settings from a TOML file, then MOEJAX_* variables, then flags that are not None; the last one wins.

        Raises InvalidRequest on an unknown key, naming the nearest, and on a value of the wrong type.
        """
        values: dict[str, Any] = {}
        if file is not None:
            values |= _read_file(Path(file))
        known = {f.name for f in dataclasses.fields(cls)}
        values |= _read_environment(environment, known)
        values |= {k: v for k, v in flags.items() if v is not None}
        hints = typing.get_type_hints(cls)
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise InvalidRequest(f"unknown setting {key!r}.{hint}", param=key)
        return cls(**{k: _read(k, v, hints[k]) for k, v in values.items()})

    def to_toml(self) -> str:
        """All settings that have a value, as a file `load` reads."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return "".join(f"{name} = {_toml(value)}\n" for name, value in values.items() if value is not None)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    return host in ("localhost", "::1") or host.startswith("127.")


def _read_file(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except OSError as error:
        raise InvalidRequest(f"cannot read {file}: {error.strerror}.", param="config") from None
    except ValueError as error:
        raise InvalidRequest(f"{file} is not valid TOML: {error}.", param="config") from None


def _read_environment(environment: Mapping[str, str], known: set[str]) -> dict[str, str]:
    """Settings among the variables. One that is almost a setting is a mistake; others may be anybody's."""
    values: dict[str, str] = {}
    for key, text in environment.items():
        name = key.removeprefix(PREFIX)
        if not key.startswith(PREFIX) or name in OTHER_VARIABLES or _FOREIGN.fullmatch(name):
            continue
        if name.lower() in known:
            values[name.lower()] = text
        elif near := difflib.get_close_matches(name.lower(), known, n=1, cutoff=_ENVIRONMENT_CLOSENESS):
            raise InvalidRequest(f"unknown variable {key}. Did you mean {PREFIX}{near[0].upper()}?", param=name.lower())
    return values


def _read(key: str, value: Any, hint: Any) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = kinds[0]
    try:
        if typing.get_origin(kind) is tuple:
            if value == "auto":
                return ()
            rows = [r.split(",") for r in value.split(";")] if isinstance(value, str) else value
            return tuple(tuple(int(n) for n in row) for row in rows)
        if kind is bool and isinstance(value, str):
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[value.lower()]
        if (isinstance(value, bool) and kind is not bool) or (kind is int and isinstance(value, float)):
            raise ValueError
        if kind is bool and not isinstance(value, bool):
            raise ValueError
        if kind is str:
            return str(os.fspath(typing.cast(Any, value)))
        return kind(value)
    except (ValueError, TypeError, KeyError):
        name = getattr(kind, "__name__", kind)
        raise InvalidRequest(f"setting {key!r} is {value!r}, which is no {name}.", param=key) from None


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(v) for v in value)}]"
    if isinstance(value, (int, float)):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # which JSON leaves as it is
