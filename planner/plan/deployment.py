"""A plan with everything it was made for, in one file: model, cluster, traffic and the losses it must survive."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from planner.errors import InputError, unknown_key
from planner.inputs.cluster import Cluster, Device, Hardware
from planner.inputs.file_kinds import FileKind, described
from planner.inputs.recovery_times import RecoveryTimes
from planner.inputs.traffic import Traffic, read_pairs
from planner.inputs.workload import Workload
from planner.plan.expert_loads import load_shares
from planner.plan.plan import Plan
from planner.plan.shape import Shape


@dataclass(frozen=True, kw_only=True)
class FaultTolerance:
    """How many ranks, hosts and racks may be lost at once without new weight buffers (`--survive`)."""

    ranks: int = 1
    hosts: int = 0
    racks: int = 0

    def __post_init__(self) -> None:
        for f in fields(self):
            if getattr(self, f.name) < 0:
                raise InputError(f"--survive {f.name}={getattr(self, f.name)}: must be at least 0")

    def most_lost(self, cluster: Cluster) -> int:
        """The largest number of ranks that any of these losses takes."""
        worst = [self.ranks]
        for kind, count in (("host", self.hosts), ("rack", self.racks)):
            sizes = sorted((len(ids) for ids in cluster.domains(kind).values()), reverse=True)
            worst.append(sum(sizes[:count]))
        return max(worst)

    def __str__(self) -> str:
        return ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name)) or "ranks=0"


def read_fault_tolerance(text: str | None) -> FaultTolerance:
    """FaultTolerance from `ranks=2,hosts=1`; one rank when the text is empty."""
    if not text:
        return FaultTolerance()
    return FaultTolerance(**read_pairs(text, {f.name: int for f in fields(FaultTolerance)}, "--survive"))


PLANNED_ONLY = "planned, not served by this version"
READ_POOLS = (
    "`degrade`, `certify`, `simulate`, `diff`, `explain`, `report` and `export` read it. Solve with another --arch."
)
WORKS = ("all", "prompts", "decode")
PLAN_FILE = FileKind(
    no="not a plan file", way_out="Give the file of `moejax plan solve --out FILE`, or of `moejax status --plan`."
)


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A plan, and the model, cluster and traffic it was made for: the content of a plan file.

    `survive` is the fault tolerance that was asked for, `loads` the traffic of each expert [moe_layers][experts] (empty
    when even), `config` the model's configuration as it was given (empty when only its numbers are known), `recovery`
    the phases of a server's own recoveries (None: it had none). `work` is the part of requests that it computes: "all",
    or in a plan of pools (`planner.plan.pools`) "prompts" or "decode". The names of the fields are keys of plan files.
    """

    plan: Plan
    workload: Workload
    cluster: Cluster
    traffic: Traffic = field(default_factory=Traffic)
    survive: FaultTolerance = field(default_factory=FaultTolerance)
    loads: tuple[tuple[float, ...], ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    recovery: RecoveryTimes | None = None
    work: str = "all"

    def __post_init__(self) -> None:
        if self.work not in WORKS:
            raise InputError(f"work is {self.work!r}, none of {', '.join(WORKS)}")

    def load_array(self) -> np.ndarray:
        """Each expert's share of its layer's traffic, float [moe_layers, experts]."""
        return load_shares(np.array(self.loads) if self.loads else None, self.workload)

    @property
    def shape(self) -> Shape:
        """The mesh of the plan, as the cost model takes it."""
        return shape_of(self.plan)

    def to_json(self) -> str:
        """JSON text; `from_json` gives back an equal deployment."""
        data = asdict(self)
        data["plan"] = json.loads(self.plan.to_json())
        data["cluster"]["devices"] = [
            [d.id, d.host, d.rack, *([d.kind] if d.kind else [])] for d in self.cluster.devices
        ]
        if not self.cluster.kinds:
            del data["cluster"]["kinds"]
        if self.work == "all":
            del data["work"]
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Deployment:
        """The deployment written by `to_json`, alone or as "deployment" in a larger object.

        Raises InputError when the text is no plan file, naming the key or the value that is wrong.
        """
        data = PLAN_FILE.parse(text)
        if isinstance(data, dict) and "deployment" in data:
            data = data["deployment"]
        if isinstance(data, dict) and {"prefill", "decode"} <= set(data):
            raise InputError(f"this is a plan of pools for prompts and for decode, not of one mesh; {READ_POOLS}")
        if not isinstance(data, dict) or not {"plan", "workload", "cluster"} <= set(data):
            raise PLAN_FILE.error(f"it is {described(data)}")
        for key in data:
            if key not in cls.__dataclass_fields__:
                raise unknown_key(key, cls.__dataclass_fields__, "plan file")
        cluster = data["cluster"]
        try:
            devices = tuple(
                Device(id=i, host=h, rack=r, kind=kind[0] if kind else "") for i, h, r, *kind in cluster["devices"]
            )
            kinds = {name: _build(Hardware, each) for name, each in cluster.get("kinds", {}).items()}
            hardware = _build(Hardware, cluster["hardware"])
            return cls(
                plan=Plan.from_json(json.dumps(data["plan"])),
                workload=_build(Workload, data["workload"]),
                cluster=Cluster(name=cluster["name"], devices=devices, hardware=hardware, kinds=kinds),
                traffic=_build(Traffic, data.get("traffic", {})),
                survive=_build(FaultTolerance, data.get("survive", {})),
                loads=tuple(tuple(float(x) for x in row) for row in data.get("loads", ())),
                config=dict(data.get("config", {})),
                recovery=_build(RecoveryTimes, data["recovery"]) if data.get("recovery") else None,
                work=data.get("work", "all"),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise PLAN_FILE.wrong(error) from None


def _build(kind: type, table: Mapping[str, Any]) -> Any:
    """A dataclass from a JSON object with its fields as keys. InputError naming a key that it does not have."""
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
    """The deployment in a plan file. Raises InputError when the file cannot be read or is none."""
    return PLAN_FILE.read(path, Deployment.from_json)
