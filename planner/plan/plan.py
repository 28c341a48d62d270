"""The Plan: the ranks alive, the expert in each of their slots, and the predicted cost."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np

from planner.errors import InvalidPlan, unknown_key
from planner.plan.routing import route

ROLES = ("collocated", "attention", "expert", "standby")
EXPERT_ROLES = ("collocated", "expert")
ATTENTION_ROLES = ("collocated", "attention")


@dataclass(frozen=True, kw_only=True)
class PlannedRank:
    """A rank of a plan: its id, its fault domains (host and rack), its role, and its place in a tensor group.

    `group` is the index of its tensor group along the data axis, -1 for a rank without attention; `shard` is the index
    of its shard of the heads within the group.
    """

    id: int
    host: str
    role: str = "collocated"
    rack: str = ""
    group: int = -1
    shard: int = 0


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One predicted or measured number and its source: "estimate", "aot" (the compiler) or "measured". `low` and `high`
    are the ends of its range, where it has one."""

    name: str
    value: float
    unit: str
    source: str = "estimate"
    low: float | None = None
    high: float | None = None

    def to_dict(self) -> dict:
        """The figure for JSON, without the ends that it lacks."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ParityGroup:
    """Physical slot `slot` of MoE layer `layer` holds the XOR of the weights of the experts `members`.

    Any one of them can be rebuilt from the others. The slot counts as empty in the slot table.
    """

    layer: int
    slot: int
    members: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which rank does what and holds which experts. Field names are keys of plan files.

    `slots[layer][position * slots_per_rank + s]` is the logical expert in slot `s` of the rank at `position` among
    `expert_ranks`, or -1 when the slot is empty. Slots with `parity` count as empty. `masked` are the
    (MoE layer, expert) pairs without a slot.
    """

    epoch: int
    ranks: tuple[PlannedRank, ...]
    slots_per_rank: int
    slots: tuple[tuple[int, ...], ...]
    experts: int
    masked: tuple[tuple[int, int], ...] = ()
    pages_per_rank: int = 0
    axes: tuple[tuple[str, int], ...] = ()
    parity: tuple[ParityGroup, ...] = ()
    cost: tuple[Figure, ...] = ()

    @cached_property
    def rank_ids(self) -> tuple[int, ...]:
        """Ids of all ranks, in mesh order (ascending)."""
        return tuple(r.id for r in self.ranks)

    @cached_property
    def expert_ranks(self) -> tuple[PlannedRank, ...]:
        """The ranks with experts, in slot order."""
        return tuple(r for r in self.ranks if r.role in EXPERT_ROLES)

    @cached_property
    def expert_rank_ids(self) -> tuple[int, ...]:
        """Ids of the ranks with experts, in slot order."""
        return tuple(r.id for r in self.expert_ranks)

    @cached_property
    def attention_rank_ids(self) -> tuple[int, ...]:
        """Ids of the ranks that send tokens to experts, in mesh order."""
        return tuple(r.id for r in self.ranks if r.role in ATTENTION_ROLES)

    def role(self, rank_id: int) -> str:
        """The role of a rank. KeyError when the plan does not have it."""
        for place in self.ranks:
            if place.id == rank_id:
                return place.role
        raise KeyError(f"rank {rank_id} is not in the plan; ranks that are: {list(self.rank_ids)}")

    @cached_property
    def groups(self) -> dict[int, tuple[int, ...]]:
        """The tensor group of each attention rank: the ids of its members, in order of their shards."""
        found: dict[int, list[PlannedRank]] = {}
        for place in self.ranks:
            if place.group >= 0:
                found.setdefault(place.group, []).append(place)
        ordered = (tuple(p.id for p in sorted(places, key=lambda p: p.shard)) for places in found.values())
        return {rank: ids for ids in ordered for rank in ids}

    @property
    def moe_layers(self) -> int:
        """Number of MoE layers."""
        return len(self.slots)

    def slot_table(self) -> np.ndarray:
        """Logical expert of each physical slot, int32 [moe_layers, expert_ranks * slots_per_rank]."""
        return self._table.copy()

    def slots_by_rank(self) -> np.ndarray:
        """The slot table with an axis for ranks, int32 [moe_layers, expert ranks, slots_per_rank]."""
        return self._table.reshape(self.moe_layers, len(self.expert_ranks), self.slots_per_rank).copy()

    @cached_property
    def _table(self) -> np.ndarray:
        width = len(self.expert_ranks) * self.slots_per_rank
        return np.array(self.slots, dtype=np.int32).reshape(len(self.slots), width)

    def slots_of(self, rank_id: int) -> np.ndarray:
        """The slots of one rank, int32 [moe_layers, slots_per_rank]. KeyError when it holds no experts."""
        if rank_id not in self.expert_rank_ids:
            raise KeyError(f"rank {rank_id} holds no experts; ranks that do: {list(self.expert_rank_ids)}")
        at = self.expert_rank_ids.index(rank_id) * self.slots_per_rank
        return self._table[:, at : at + self.slots_per_rank].copy()

    def copies(self) -> np.ndarray:
        """How many slots hold each expert, int32 [moe_layers, experts]."""
        counts = np.zeros((self.moe_layers, self.experts + 1), np.int32)
        layer = np.repeat(np.arange(self.moe_layers), self._table.shape[1])
        np.add.at(counts, (layer, self._table.ravel()), 1)
        return counts[:, : self.experts]

    def expert_to_slot(self) -> np.ndarray:
        """Physical slot to which each attention rank sends an expert's tokens: int32 [ranks, moe_layers, experts].

        A rank with a copy of its own sends to that one; the others are spread evenly over the copies. -1 where the
        expert is masked.
        """
        owner = np.repeat(np.array(self.expert_rank_ids, np.int64), self.slots_per_rank)
        return route(self._table, owner, np.array(self.attention_rank_ids, np.int64), self.experts)

    def figure(self, name: str, default: float) -> float:
        """The predicted or measured figure of this name; `default` when the plan has none."""
        return next((figure.value for figure in self.cost if figure.name == name), default)

    def with_epoch(self, epoch: int) -> Plan:
        """The same plan under another epoch."""
        return replace(self, epoch=epoch)

    def to_json(self) -> str:
        """One line of JSON; `from_json` gives back an equal plan."""
        data = {**asdict(self), "cost": [figure.to_dict() for figure in self.cost]}
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan written by `to_json`. InvalidPlan when the text is no plan, or its parts contradict each other."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise InvalidPlan(f"not a plan: {error}") from None
        if not isinstance(data, dict):
            raise InvalidPlan(f"not a plan: a JSON object is needed, got {type(data).__name__}")
        for key in data:
            if key not in cls.__dataclass_fields__:
                raise unknown_key(key, cls.__dataclass_fields__, "plan")
        try:
            plan = cls(
                epoch=data["epoch"],
                ranks=tuple(PlannedRank(**r) for r in data["ranks"]),
                slots_per_rank=data["slots_per_rank"],
                slots=as_tuples(data["slots"]),
                experts=data["experts"],
                masked=tuple((int(layer), int(expert)) for layer, expert in data.get("masked", ())),
                pages_per_rank=data.get("pages_per_rank", 0),
                axes=tuple((str(name), int(size)) for name, size in data.get("axes", ())),
                parity=tuple(ParityGroup(**{**g, "members": tuple(g["members"])}) for g in data.get("parity", ())),
                cost=tuple(Figure(**f) for f in data.get("cost", ())),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InvalidPlan(f"not a plan: {type(error).__name__} {error}") from None
        plan.validate()
        return plan

    def validate(self) -> None:
        """Raise InvalidPlan naming both values when the parts of the plan contradict each other."""
        ids = list(self.rank_ids)
        if not ids or ids != sorted(set(ids)):
            raise InvalidPlan(f"rank ids must ascend without repeats and there must be one, got {ids[:20]}")
        for r in self.ranks:
            if r.role not in ROLES:
                raise InvalidPlan(f"rank {r.id} has role {r.role!r}; roles are {', '.join(ROLES)}")
        dense = not (self.experts or self.slots_per_rank or self.slots)
        least = 0 if dense else 1
        if min(self.slots_per_rank, self.experts) < least or self.pages_per_rank < 0 or self.epoch < 0:
            raise InvalidPlan(
                f"slots_per_rank {self.slots_per_rank} and experts {self.experts} must be at least 1 "
                f"(or both 0, without layers of slots: a dense model), "
                f"pages_per_rank {self.pages_per_rank} and epoch {self.epoch} at least 0"
            )
        width = len(self.expert_ranks) * self.slots_per_rank
        for layer, row in enumerate(self.slots):
            if len(row) != width:
                raise InvalidPlan(
                    f"layer {layer} has {len(row)} slots; "
                    f"{len(self.expert_ranks)} ranks x {self.slots_per_rank} = {width}"
                )
        if self._table.size and (self._table.min() < -1 or self._table.max() >= self.experts):
            bad = [int(e) for e in (self._table.min(), self._table.max()) if not -1 <= e < self.experts]
            raise InvalidPlan(f"slot table names expert {bad[0]}; experts are 0..{self.experts - 1}, -1 is empty")
        if self.experts * len(self.slots) > width * len(self.slots) + len(self.masked):
            raise InvalidPlan(
                f"{self.experts} experts on each of {len(self.slots)} layers, {width} slots and "
                f"{len(self.masked)} masked: there is no slot for some"
            )
        self._validate_masked()
        for g in self.parity:
            if not (0 <= g.layer < self.moe_layers and 0 <= g.slot < width):
                raise InvalidPlan(
                    f"parity group at layer {g.layer} slot {g.slot}; there are {self.moe_layers} x {width}"
                )
            if self._table[g.layer, g.slot] >= 0 or not set(g.members) <= set(range(self.experts)):
                raise InvalidPlan(f"parity slot {g.slot} of layer {g.layer} holds an expert, or protects none")

    def _validate_masked(self) -> None:
        missing = {(int(a), int(b)) for a, b in np.argwhere(self.copies() == 0)}
        masked = set(self.masked)
        if missing != masked:
            lost, extra = sorted(missing - masked), sorted(masked - missing)
            raise InvalidPlan(
                f"(layer, expert) without a slot and not masked: {lost[:5]}; "
                f"masked but in a slot: {extra[:5]}. Give each expert a slot, or mask exactly those without"
            )


def as_tuples(rows: Iterable[Iterable[int]]) -> tuple[tuple[int, ...], ...]:
    """Nested tuples of plain ints from an array or nested lists [A, B]."""
    if isinstance(rows, np.ndarray):
        return tuple(map(tuple, rows.tolist()))
    return tuple(tuple(int(x) for x in row) for row in rows)
