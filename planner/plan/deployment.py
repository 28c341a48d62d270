"""A plan with everything it was made for, in one file: model, cluster, traffic and what it must survive."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from planner.cluster import Cluster, Device, Hardware
from planner.errors import InputError, unknown_key
from planner.plan import Plan
from planner.shape import Shape
from planner.traffic import Traffic, read_pairs
from planner.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Survive:
    """How many ranks, hosts and racks may be lost at once without new weight buffers."""

    ranks: int = 1
    hosts: int = 0
    racks: int = 0

    def __post_init__(self) -> None:
        for f in fields(self):
            if getattr(self, f.name) < 0:
                raise InputError(f"--survive {f.name}={getattr(self, f.name)}: must be at least 0")

    def most_lost(self, cluster: Cluster) -> int:
        """The most ranks lost in any of those cases."""
        worst = [self.ranks]
        for kind, count in (("host", self.hosts), ("rack", self.racks)):
            sizes = sorted((len(ids) for ids in cluster.domains(kind).values()), reverse=True)
            worst.append(sum(sizes[:count]))
        return max(worst)


def read_survive(text: str | None) -> Survive:
    """Survive from `ranks=2,hosts=1`; one rank when nothing is said."""
    if not text:
        return Survive()
    return Survive(**read_pairs(text, {f.name: int for f in fields(Survive)}, "--survive"))


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A plan and its world. `loads` is the traffic of each expert [moe_layers][experts], empty when even; `config` the
    model's configuration as it was given, empty when only its numbers are known."""

    plan: Plan
    workload: Workload
    cluster: Cluster
    traffic: Traffic = field(default_factory=Traffic)
    survive: Survive = field(default_factory=Survive)
    loads: tuple[tuple[float, ...], ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    def load_array(self) -> np.ndarray:
        """Each expert's share of its layer's traffic, float [moe_layers, experts]."""
        if self.loads:
            array = np.array(self.loads)
            total = array.sum(axis=1, keepdims=True)
            return np.where(total > 0, array / np.where(total > 0, total, 1), 1 / max(1, self.workload.experts))
        return np.full((self.workload.moe_layers, self.workload.experts), 1 / max(1, self.workload.experts))

    @property
    def shape(self) -> Shape:
        """The mesh of the plan, as the cost model takes it."""
        return shape_of(self.plan)

    def to_json(self) -> str:
        """JSON text; `from_json` gives back an equal deployment."""
        data = asdict(self)
        data["plan"] = json.loads(self.plan.to_json())
        data["cluster"]["devices"] = [[d.id, d.host, d.rack] for d in self.cluster.devices]
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Deployment:
        """The deployment written by `to_json`, alone or as "deployment" in a larger object."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"not a plan file: {error}") from None
        if isinstance(data, dict) and "deployment" in data:
            data = data["deployment"]
        if not isinstance(data, dict) or not {"plan", "workload", "cluster"} <= set(data):
            raise InputError("not a plan file: it needs plan, workload and cluster, as `solve --out FILE` writes")
        for key in data:
            if key not in cls.__dataclass_fields__:
                raise unknown_key(key, cls.__dataclass_fields__, "plan file")
        cluster = data["cluster"]
        try:
            devices = tuple(Device(id=i, host=h, rack=r) for i, h, r in cluster["devices"])
            return cls(
                plan=Plan.from_json(json.dumps(data["plan"])),
                workload=_build(Workload, data["workload"]),
                cluster=Cluster(name=cluster["name"], devices=devices, hardware=_build(Hardware, cluster["hardware"])),
                traffic=_build(Traffic, data.get("traffic", {})),
                survive=_build(Survive, data.get("survive", {})),
                loads=tuple(tuple(float(x) for x in row) for row in data.get("loads", ())),
                config=dict(data.get("config", {})),
            )
        except InputError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"not a plan file: {type(error).__name__} {error}") from None


def _build(kind: type, table: Mapping[str, Any]) -> Any:
    known = [f.name for f in fields(kind)]
    for key in table:
        if key not in known:
            raise unknown_key(key, known, kind.__name__)
    return kind(**table)


def shape_of(plan: Plan) -> Shape:
    """The mesh of a plan as a Shape."""
    axes = dict(plan.axes)
    tensor = axes.get("tensor", 1)
    roles = tuple(r.role for r in plan.ranks)
    return Shape(
        arch="disaggregated" if "attention" in roles else "collocated",
        tensor=tensor,
        dense=axes.get("dense", tensor),
        slots=plan.slots_per_rank,
        roles=roles,
        groups=tuple(r.group for r in plan.ranks),
    )


def read_deployment(path: str | Path) -> Deployment:
    """The deployment in a plan file."""
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise InputError(f"cannot read plan file {path}: {error.strerror}") from None
    return Deployment.from_json(text)


def read_loads(path: str | Path, workload: Workload) -> tuple[tuple[float, ...], ...]:
    """Measured loads from JSON: a list of rows, one per MoE layer, alone or under the key "loads"."""
    try:
        data = json.loads(Path(path).read_text())
    except OSError as error:
        raise InputError(f"cannot read loads {path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    rows = data.get("loads") if isinstance(data, dict) else data
    shape = (workload.moe_layers, workload.experts)
    try:
        array = np.array(rows, np.float64)
    except (TypeError, ValueError):
        array = np.zeros(0)
    if array.shape != shape:
        raise InputError(f"{path}: loads have shape {array.shape}; the model has [moe_layers, experts] = {shape}")
    if not np.isfinite(array).all() or (array < 0).any():
        raise InputError(f"{path}: loads must be finite and at least 0, got {array.min()} to {array.max()}")
    return tuple(tuple(map(float, row)) for row in array.reshape(shape))


def zipf_loads(workload: Workload, exponent: float, seed: int = 0) -> np.ndarray:
    """Loads that fall as 1/rank**exponent, in another order on each layer: float [moe_layers, experts]."""
    if not isfinite(exponent) or exponent < 0:
        raise InputError(f"--skew is {exponent}; a Zipf exponent is a number of at least 0 (0 is even)")
    row = np.arange(1, workload.experts + 1) ** -float(exponent)
    rows = np.tile(row / row.sum(), (workload.moe_layers, 1))
    return np.random.default_rng(seed).permuted(rows, axis=1)
