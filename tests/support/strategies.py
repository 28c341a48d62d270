"""Hypothesis strategies: small models, clusters, loads and sets of dead ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from planner import Cluster, Hardware, Workload


@dataclass(frozen=True)
class Case:
    """A solvable problem: model, cluster, slots per rank and loads [moe_layers, experts]."""

    workload: Workload
    cluster: Cluster
    slots: int
    loads: np.ndarray

    @property
    def ranks(self) -> int:
        return len(self.cluster.devices)


@st.composite
def cases(draw, most_ranks: int = 9, spare: int = 3) -> Case:
    """Up to `most_ranks` ranks on hosts of 1 to 4, and up to `spare` slots per rank above the least."""
    hosts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4).filter(lambda h: sum(h) <= most_ranks))
    names = [f"h{i}" for i, size in enumerate(hosts) for _ in range(size)]
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    least = -(-experts // len(names))
    slots = least + draw(st.integers(0, spare))
    seed = draw(st.integers(0, 2**16))
    loads = np.random.default_rng(seed).pareto(draw(st.sampled_from([0.8, 2.0, 8.0])), (layers, experts))
    workload = Workload(moe_layers=layers, experts=experts, experts_per_token=1, expert_bytes=100)
    cluster = Cluster(name="drawn", devices=Cluster.local(len(names), hosts=names).devices, hardware=Hardware())
    return Case(workload, cluster, slots, loads)
