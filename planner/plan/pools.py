"""A plan of pools (P/D): instances that compute prompts, and one that decodes, to which the KV cache is sent."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from planner.errors import InputError, unknown_key
from planner.plan.deployment import PLAN_FILE, PLANNED_ONLY, Deployment
from planner.plan.plan import Figure, Plan, as_tuples
from planner.plan.shape import POOLS


@dataclass(frozen=True, kw_only=True)
class PooledDeployment:
    """Deployments of one model and traffic on parts of a cluster: the `prefill` instances, which are alike, and the one
    for `decode`. `figures` are the predictions for all of them together."""

    prefill: tuple[Deployment, ...]
    decode: Deployment
    figures: tuple[Figure, ...] = ()

    def __post_init__(self) -> None:
        if not self.prefill:
            raise InputError("a plan of pools has at least one prefill instance")
        for pool, work in self._pools():
            if pool.work != work:
                raise InputError(f"a pool for {work} has the work {pool.work!r}")
        ids = [rank for pool, _ in self._pools() for rank in pool.plan.rank_ids]
        if len(ids) != len(set(ids)):
            raise InputError("two pools of a plan share a rank")

    def _pools(self) -> Iterator[tuple[Deployment, str]]:
        for pool in self.prefill:
            yield pool, "prompts"
        yield self.decode, "decode"

    def pools(self) -> dict[str, Deployment]:
        """All pools by name: "prefill 0" and on, and "decode"."""
        return {**{f"prefill {i}": pool for i, pool in enumerate(self.prefill)}, "decode": self.decode}

    @property
    def whole(self) -> Plan:
        """All ranks with their experts as one plan, in which every pool has its own copies: for what asks only who
        holds what. Pools of fewer slots have empty ones."""
        plans = [pool.plan for pool, _ in self._pools()]
        slots = max(plan.slots_per_rank for plan in plans)
        rows: dict[int, np.ndarray] = {}
        for plan in plans:
            table = plan.slots_by_rank()
            for at, rank in enumerate(plan.expert_rank_ids):
                row = np.full((len(table), slots), -1, np.int32)
                row[:, : plan.slots_per_rank] = table[:, at]
                rows[rank] = row
        table = np.concatenate([rows[rank] for rank in sorted(rows)], axis=1)
        return Plan(
            epoch=max(plan.epoch for plan in plans),
            ranks=tuple(sorted((rank for plan in plans for rank in plan.ranks), key=lambda rank: rank.id)),
            slots_per_rank=slots,
            slots=as_tuples(table),
            experts=plans[0].experts,
        )

    def each(self, change: Callable[[Deployment], Deployment]) -> PooledDeployment:
        """The same pools with `change` made to each."""
        return replace(self, prefill=tuple(map(change, self.prefill)), decode=change(self.decode))

    @property
    def only_planned(self) -> str:
        """PLANNED_ONLY where this version does not serve the plan, else nothing."""
        return PLANNED_ONLY if any(dict(p.plan.axes).get("tensor", 1) > 1 for p in self.pools().values()) else ""

    @property
    def service(self) -> str:
        """The command that serves the plan, or that this version only plans it: pools are served with all attention
        heads on each rank."""
        if self.only_planned:
            return self.only_planned
        hosts = {rank.host for pool in self.pools().values() for rank in pool.plan.ranks}
        prefill, decode = sum(len(pool.plan.ranks) for pool in self.prefill), len(self.decode.plan.ranks)
        join = " --launcher join" if len(hosts) > 1 else ""
        return f"served by `moejax serve --arch {POOLS} --prefill {prefill} --decode {decode}{join}`"

    def figure(self, name: str) -> float:
        """The value of one of the figures. KeyError when there is none of this name."""
        return {each.name: each.value for each in self.figures}[name]

    def to_json(self) -> str:
        """JSON text; `from_json` gives back an equal plan."""
        data = {
            "prefill": [json.loads(pool.to_json()) for pool in self.prefill],
            "decode": json.loads(self.decode.to_json()),
            "figures": [each.to_dict() for each in self.figures],
        }
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> PooledDeployment:
        """The plan written by `to_json`. Raises InputError for any other text."""
        data = PLAN_FILE.parse_object(text, "prefill", "decode")
        for key in data:
            if key not in cls.__dataclass_fields__:
                raise unknown_key(key, cls.__dataclass_fields__, "plan of pools")
        try:
            prefill = tuple(Deployment.from_json(json.dumps(each)) for each in data["prefill"])
            figures = tuple(Figure(**each) for each in data.get("figures", ()))
            return cls(prefill=prefill, decode=Deployment.from_json(json.dumps(data["decode"])), figures=figures)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PLAN_FILE.wrong(error) from None


AnyDeployment = Deployment | PooledDeployment
"""A plan with everything it was made for: of one mesh, or of pools."""


def any_deployment(text: str) -> AnyDeployment:
    """The deployment written by `to_json`, of pools or not, alone or as "deployment" in a larger object.

    Raises InputError for any other text.
    """
    data = PLAN_FILE.parse(text)
    if isinstance(data, dict) and isinstance(data.get("deployment"), dict):
        data = data["deployment"]
    if isinstance(data, dict) and {"prefill", "decode"} <= set(data):
        return PooledDeployment.from_json(json.dumps(data))
    return Deployment.from_json(text)


def read_any_deployment(path: str | Path) -> AnyDeployment:
    """The deployment in a plan file, of pools or not. Raises InputError when the file cannot be read or is none."""
    return PLAN_FILE.read(path, any_deployment)
