"""The hardware in numbers: devices, the hosts and racks they share, and how fast bytes move."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields

from planner.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator; rank `id` runs on it. Devices of one host, or of one rack, can die together."""

    id: int
    host: str
    rack: str = ""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What one device and its surroundings can do. Bytes, bytes/s, flop/s, seconds, hours.

    Bandwidths are per device and one direction; `store_bandwidth` is per host. `memory_bytes=None`
    means that memory is not a limit worth planning for.
    """

    name: str = "cpu"
    memory_bytes: int | None = None
    memory_bandwidth: float = 12e9
    flops: float = 100e9
    link_bandwidth: float = 2e9
    network_bandwidth: float = 1e9
    host_to_device_bandwidth: float = 4e9
    store_bandwidth: float = 2e9
    collective_latency: float = 3e-4
    device_mtbf_hours: float = 50_000.0
    host_mtbf_hours: float = 100_000.0
    repair_hours: float = 24.0

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "name" or (f.name == "memory_bytes" and value is None):
                continue
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
                raise InputError(
                    f"hardware {self.name!r}: {f.name} is {value!r}, it must be a number above 0"
                )


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Devices in ascending id, all of one kind of hardware."""

    name: str
    devices: tuple[Device, ...]
    hardware: Hardware = field(default_factory=Hardware)

    def __post_init__(self) -> None:
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
    def regular(
        cls, name: str, hosts: int, per_host: int, *, hardware: Hardware, hosts_per_rack: int = 8
    ) -> Cluster:
        """`hosts` equal hosts of `per_host` devices each; ids count through the hosts."""
        devices = tuple(
            Device(id=h * per_host + i, host=f"host{h}", rack=f"rack{h // hosts_per_rack}")
            for h in range(hosts)
            for i in range(per_host)
        )
        return cls(name=name, devices=devices, hardware=hardware)

    @property
    def ids(self) -> tuple[int, ...]:
        """All device ids, ascending."""
        return tuple(d.id for d in self.devices)

    def alive(self, ids: Collection[int] | None) -> tuple[Device, ...]:
        """The devices whose id is in `ids` (all when None), ascending."""
        if ids is None:
            return self.devices
        chosen = set(ids)
        unknown = chosen.difference(self.ids)
        if unknown:
            raise InputError(
                f"ranks {sorted(unknown)} are not in cluster {self.name!r}, "
                f"which has {len(self.devices)} devices"
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
