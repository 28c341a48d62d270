"""The hardware in numbers: devices, the hosts and racks they share, and how fast bytes move."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from planner.errors import InputError, unknown_key, unknown_value
from planner.inputs.shipped import shipped

MOST_DEVICES = 1_000_000
OPTIONAL = ("memory_bytes", "flops_8bit", "flops_4bit")
PRESETS = shipped("configs/clusters")
STORES = ("memory", "disk", "network")


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator; rank `id` runs on it. Devices of one host, or of one rack, can die together. `kind` names its
    hardware in a cluster of several kinds."""

    id: int
    host: str
    rack: str = ""
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The capabilities of one device and of its surroundings, in bytes, bytes/s, flop/s, seconds, hours.

    Bandwidths are per device and one direction; `store_bandwidth` (a host's memory) and `disk_bandwidth` are per host,
    `shared_store_bandwidth` of all hosts together. `store` is where lost experts are read from: the memory of the host,
    its disk, or over the network from a store that all hosts share. `memory_bytes=None`
    means that memory is not a limit worth planning for. `efficiency` is the share of peak flops and
    bandwidth that a well-written step reaches; latencies are seconds for a collective and for a step.
    `engine` names the constants of a step (`planner.inputs.engine`): "jax" takes those above, others have their own.
    """

    name: str = "cpu"
    memory_bytes: int | None = None
    memory_bandwidth: float = 12e9
    flops: float = 100e9
    link_bandwidth: float = 2e9
    network_bandwidth: float = 1e9
    host_to_device_bandwidth: float = 4e9
    store_bandwidth: float = 2e9
    disk_bandwidth: float = 2e9
    shared_store_bandwidth: float = 5e9
    store: str = "memory"
    collective_latency: float = 3e-4
    step_overhead: float = 1e-3
    flops_8bit: float | None = None
    flops_4bit: float | None = None
    efficiency: float = 0.7
    device_mtbf_hours: float = 50_000.0
    host_mtbf_hours: float = 100_000.0
    repair_hours: float = 24.0
    engine: str = "jax"

    @property
    def is_tpu(self) -> bool:
        """Whether the device is a TPU, by its name."""
        return self.name.startswith("v")

    def __post_init__(self) -> None:
        if self.store not in STORES:
            raise unknown_value(self.store, STORES, f"the store of hardware {self.name!r}, none of")
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("name", "engine", "store") or (f.name in OPTIONAL and value is None):
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 < value < float("inf"):
                raise InputError(f"hardware {self.name!r}: {f.name} is {value!r}, it must be a number above 0")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Devices in ascending id. Where they are of several `kinds`, by name, `hardware` has the least of each figure:
    it describes a device that none of them is slower or smaller than (`slowest`)."""

    name: str
    devices: tuple[Device, ...]
    hardware: Hardware = field(default_factory=Hardware)
    kinds: Mapping[str, Hardware] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kinds and (unknown := {d.kind for d in self.devices}.difference(self.kinds)):
            raise InputError(f"cluster {self.name!r}: hardware {min(unknown)!r} is none of {', '.join(self.kinds)}")
        ids = [d.id for d in self.devices]
        if ids != sorted(set(ids)):
            raise InputError(f"cluster {self.name!r}: device ids must ascend without repeats, got {ids[:20]}")
        if ids and ids[0] < 0:
            raise InputError(f"cluster {self.name!r}: device id {ids[0]} is below 0")

    @classmethod
    def local(cls, n: int, *, memory_bytes: int | None = None, hosts: Sequence[str] | None = None) -> Cluster:
        """`n` ranks on this machine, ids 0..n-1, or one rank on each of the named `hosts` (length `n`)."""
        names = list(hosts) if hosts is not None else ["localhost"] * n
        if len(names) != n:
            raise InputError(f"{len(names)} hosts named for {n} ranks; name one host for each rank")
        devices = tuple(Device(id=i, host=h) for i, h in enumerate(names))
        return cls(name="local", devices=devices, hardware=Hardware(memory_bytes=memory_bytes))

    @classmethod
    def regular(cls, name: str, hosts: int, per_host: int, *, hardware: Hardware, hosts_per_rack: int = 8) -> Cluster:
        """`hosts` equal hosts of `per_host` devices each; ids count through the hosts."""
        devices = tuple(
            Device(id=h * per_host + i, host=f"host{h}", rack=f"rack{h // hosts_per_rack}")
            for h in range(hosts)
            for i in range(per_host)
        )
        return cls(name=name, devices=devices, hardware=hardware)

    def only(self, kind: str) -> Cluster:
        """The cluster as if all its devices were of this kind."""
        devices = tuple(replace(d, kind="") for d in self.devices)
        return replace(self, devices=devices, hardware=self.kinds[kind], kinds={})

    @property
    def ids(self) -> tuple[int, ...]:
        """All device ids, ascending."""
        return tuple(d.id for d in self.devices)

    @cached_property
    def per_host(self) -> int:
        """Devices of the largest host."""
        return max((len(ids) for ids in self.domains("host").values()), default=0)

    def alive(self, ids: Collection[int] | None) -> tuple[Device, ...]:
        """The devices whose id is in `ids` (all when None), ascending."""
        if ids is None:
            return self.devices
        chosen = set(ids)
        unknown = chosen.difference(self.ids)
        if unknown:
            raise InputError(
                f"ranks {sorted(unknown)} are not in cluster {self.name!r}, which has {len(self.devices)} devices"
            )
        return tuple(d for d in self.devices if d.id in chosen)

    def domains(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Device ids by fault domain: `kind` is "rank", "host" or "rack"."""
        if kind not in ("rank", "host", "rack"):
            raise InputError(f"fault domain {kind!r} is none of rank, host, rack")
        groups: dict[str, list[int]] = {}
        for d in self.devices:
            key = str(d.id) if kind == "rank" else getattr(d, kind)
            if key:
                groups.setdefault(key, []).append(d.id)
        return {name: tuple(ids) for name, ids in groups.items()}


def slowest(kinds: Mapping[str, Hardware]) -> Hardware:
    """Hardware with the least of each figure of several kinds: the smallest memory and rates, the largest latencies.

    Raises InputError for kinds with different engines, or stores of different kinds.
    """
    found: dict[str, Any] = {"name": "+".join(kinds)}
    for f in fields(Hardware):
        values = [getattr(hardware, f.name) for hardware in kinds.values()]
        if f.name in ("engine", "store") and len(set(values)) > 1:
            raise InputError(
                f"hosts of {', '.join(kinds)} have {f.name} {', '.join(values)}; give them one in [hardware]"
            )
        if f.name in ("engine", "store"):
            found[f.name] = values[0]
        elif f.name != "name":
            given = [value for value in values if value is not None]
            worst = max if f.name in ("collective_latency", "step_overhead", "repair_hours") else min
            all_given = len(given) == len(values) or f.name == "memory_bytes"
            found[f.name] = worst(given) if given and all_given else None
    return Hardware(**found)


def read_cluster(text: str) -> Cluster:
    """A cluster from a TOML file, from a preset (`h200`), or from a preset with a size (`h200:40x8`).

    A file has `name`, a `[hardware]` table (the fields of Hardware, or `preset = "h200"` and what differs)
    and either `[[hosts]]` with `count`, `devices` and `hosts_per_rack`, or `[[devices]]` with `id`, `host`
    and `rack`. Hosts and devices with a `preset` of their own are of another kind: its figures, with those of
    `[hardware]` beside its preset in their place.
    """
    match = re.fullmatch(r"([\w.-]+?)(?::(\d+)x(\d+))?", text)
    preset = PRESETS / f"{match[1]}.toml" if match else None
    if preset is not None and preset.is_file() and not Path(text).is_file():
        data = _read_toml(preset)
        if match and match[2]:
            rack = data.get("hosts", [{}])[0].get("hosts_per_rack", 4)
            data["hosts"] = [{"count": int(match[2]), "devices": int(match[3]), "hosts_per_rack": rack}]
            data["name"] = text
        return cluster_from(data, text)
    path = Path(text)
    if not path.is_file():
        known = [p.stem for p in sorted(PRESETS.glob("*.toml"))]
        raise unknown_value(text, known, "neither a file nor a preset such as h200 or h200:40x8; presets are")
    return cluster_from(_read_toml(path), str(path))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise InputError(f"cannot read cluster {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML, as a cluster file is: {error}") from None


def cluster_from(data: Mapping[str, Any], where: str) -> Cluster:
    """The cluster that the tables of a cluster file describe; `where` names the file in errors."""
    _known(data, ("name", "hardware", "hosts", "devices"), where)
    hardware = dict(_table(data.get("hardware", {}), f"{where} [hardware]"))
    if (preset := hardware.pop("preset", None)) is not None:
        _preset(preset, where)
    _known(hardware, [f.name for f in fields(Hardware)], f"{where} [hardware]")
    devices: list[Device] = []
    for row in _rows(data, "devices", where):
        _known(row, ("id", "host", "rack", "preset"), f"{where} [[devices]]")
        host, kind = _text(row, "host", where), row.get("preset", preset)
        devices.append(
            Device(id=_count(row, "id", where, 0), host=host, rack=_text(row, "rack", where, ""), kind=kind or "")
        )
    hosts = 0
    for row in _rows(data, "hosts", where):
        _known(row, ("count", "devices", "hosts_per_rack", "preset"), f"{where} [[hosts]]")
        per_rack = _count(row, "hosts_per_rack", where, 1) if "hosts_per_rack" in row else 1
        count, each = _count(row, "count", where, 1), _count(row, "devices", where, 1)
        if len(devices) + count * each > MOST_DEVICES:
            raise InputError(f"{where}: {count:,} hosts of {each:,} devices; a cluster has at most {MOST_DEVICES:,}")
        for _ in range(count):
            rack, kind = f"rack{hosts // per_rack}", row.get("preset", preset) or ""
            devices += [Device(id=len(devices) + i, host=f"host{hosts}", rack=rack, kind=kind) for i in range(each)]
            hosts += 1
    if not devices:
        raise InputError(f"{where} has no devices: give [[hosts]] or [[devices]]")
    devices.sort(key=lambda d: d.id)
    return _of_kinds(str(data.get("name", where)), devices, preset, hardware, where)


def _of_kinds(name: str, devices: list[Device], preset: object, differs: Mapping[str, Any], where: str) -> Cluster:
    """The cluster of devices whose `kind` is the name of a preset, or empty for hardware without one. What `differs`
    in `[hardware]` holds for all of them."""
    names = list(dict.fromkeys(d.kind for d in devices))
    if len(names) > 1 and "" in names:
        raise InputError(f"{where}: hosts of several kinds need a preset each, or one in [hardware] for the others")

    def described(kind: object) -> Hardware:
        base = _read_toml(_preset(kind, where))["hardware"] if kind else {}
        try:
            return Hardware(**{**base, **differs})
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

    if len(names) == 1:
        plain = tuple(replace(d, kind="") for d in devices)
        return Cluster(name=name, devices=plain, hardware=described(names[0] or preset))
    for host in {d.host for d in devices}:
        inside = sorted({d.kind for d in devices if d.host == host})
        if len(inside) > 1:
            raise InputError(f"{where}: host {host!r} has devices of {', '.join(inside)}; a host has one kind")
    kinds = {kind: replace(described(kind), name=kind) for kind in names}
    return Cluster(name=name, devices=tuple(devices), hardware=slowest(kinds), kinds=kinds)


def _table(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{where} is {value!r}, it must be a table")
    return value


def _rows(data: Mapping[str, Any], key: str, where: str) -> list[Mapping[str, Any]]:
    rows = data.get(key, [])
    if not isinstance(rows, list):
        raise InputError(f"{where}: {key} is {rows!r}, it must be tables [[{key}]]")
    return [_table(row, f"{where} [[{key}]]") for row in rows]


def _text(row: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str:
    value = row.get(key, default)
    if not isinstance(value, str):
        raise InputError(f"{where}: {key} is {value!r}, it must be a name")
    return value


def _preset(name: object, where: str) -> Path:
    if not isinstance(name, str):
        raise InputError(f"{where} (hardware preset): {name!r} is no name of a preset")
    path = PRESETS / f"{name}.toml"
    if not path.is_file():
        raise unknown_key(name, [p.stem for p in PRESETS.glob("*.toml")], f"{where} (hardware preset)")
    return path


def _known(table: Mapping[str, Any], keys: Collection[str], where: str) -> None:
    for key in table:
        if key not in keys:
            raise unknown_key(key, keys, where)


def _count(row: Mapping[str, Any], key: str, where: str, least: int) -> int:
    value = row.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{where}: {key} is {value!r}, it must be a whole number of at least {least}")
    return value
