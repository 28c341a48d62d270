"""The band around a predicted figure: how far measured settings of its kind were from their predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf

from planner.cost.measured_models import measured_name
from planner.inputs.cluster import Cluster
from planner.inputs.engine import HERE, engine_of, read_profile
from planner.inputs.traffic import Traffic
from planner.inputs.workload import Workload
from planner.plan.deployment import Deployment
from planner.plan.plan import Figure
from planner.plan.shape import Shape

UNCHECKED = 2.0
"""The error factor of figures of an engine that was never compared with measurements, an assumption."""
BEYOND = 1.5
"""The least error factor of figures beyond what was measured, an assumption: all published figures of wide expert
parallel deployments lie within it but one, of two requests a rank (docs/results/planner_accuracy.md)."""
OWN = 1.25
"""The error factor of phases of a recovery that were measured, and of the front's work, which follows lines through
measurements: an assumption."""
FEW = 10
SMALLER = 2
"""How many times smaller than the smallest measured model one may be without leaving what was measured."""
POOLS_BAND = "pools for prompts and decode"
QUANTITIES = ("tpot", "ttft", "rate")


@dataclass(frozen=True, kw_only=True)
class Band:
    """The error factors of a prediction's figures: of the time per output token, the time to first token and tokens/s.

    They are those of `count` measured settings of this kind, or of those of other models on this chip where `others`
    says so (fewer than FEW are of this model), unless `beyond` says in which way the prediction leaves what was
    measured.
    """

    tpot: float
    ttft: float
    rate: float
    count: int = 0
    others: bool = False
    beyond: str = ""

    def beyond_by(self, how: str) -> Band:
        """The band of a prediction that leaves what was measured in this way, too."""
        beyond = ", ".join(filter(None, (self.beyond, how)))
        tpot, ttft, rate = (max(BEYOND, each) for each in (self.tpot, self.ttft, self.rate))
        return replace(self, tpot=tpot, ttft=ttft, rate=rate, beyond=beyond)

    def around(self, value: float, quantity: str) -> dict[str, float]:
        """`value` as {low, mid, high}; `quantity` is one of QUANTITIES."""
        factor = getattr(self, quantity)
        return {"low": value / factor, "mid": value, "high": value * factor}

    def figure(self, name: str, value: float, unit: str, quantity: str) -> Figure:
        """`value` as a figure of a plan, with the ends of its range where `quantity` is one of QUANTITIES."""
        ends = self.around(float(value), quantity) if quantity else {}
        return Figure(name=name, value=float(value), unit=unit, low=ends.get("low"), high=ends.get("high"))

    def text(self, value: float, quantity: str, unit: str) -> str:
        """`value` as a range, such as "18-26 ms"."""
        return f"{range_text(self.around(value, quantity))} {unit}"

    def source(self, quantity: str = "tpot") -> str:
        """The reason for the width of the band, in brackets."""
        factor = getattr(self, quantity)
        if self.beyond:
            return f"[outside of what was measured: {self.beyond}; error factor {factor:.2g} assumed]"
        kind = "of other models on this chip" if self.others else "of this kind"
        return f"[measured settings {kind}: error factor {factor:.3g}, n = {self.count}]"

    def to_dict(self) -> dict:
        """The band for JSON."""
        factors = {name: getattr(self, name) for name in QUANTITIES}
        known = {"settings": self.count, "of_other_models": self.others, "outside_of_measured": self.beyond}
        return {"error_factor": factors, **known}


def range_text(ends: Mapping[str, float]) -> str:
    """{low, high} as "18.0-26.0", or as one number where both look alike."""
    low, high = short(ends["low"]), short(ends["high"])
    return low if low == high else f"{low}-{high}"


def own_range(value: float) -> dict[str, float]:
    """Seconds of the front, or of measured phases, as {low, mid, high}."""
    return {"low": value / OWN, "mid": value, "high": value * OWN}


def short(value: float) -> str:
    """A number with three digits; `never` for endless seconds."""
    if value == inf:
        return "never"
    if not value:
        return "0"
    if value >= 999.5:
        value = float(f"{value:.3g}")
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def band_of(workload: Workload, cluster: Cluster, shape: Shape, requests: float, prompt: float) -> Band:
    """The band of the prediction for a model on a shape, with `requests` on each tensor group and `prompt` tokens."""
    engine = engine_of(cluster.hardware)
    if engine.name == HERE:
        where = f"engine {HERE} on {cluster.hardware.name}, never compared"
        return Band(tpot=UNCHECKED, ttft=UNCHECKED, rate=UNCHECKED, beyond=where)
    checked = read_profile(engine.name)[1]
    limits, kinds = checked["limits"], checked["kinds"]
    beyond = _beyond(limits, workload, cluster, shape, requests, prompt)
    chip, model = cluster.hardware.name, measured_name(workload.name)
    own = kinds.get(f"{chip} {model}")
    others = own is None or own["count"] < FEW
    if others:
        own = kinds.get(chip)
    if own is None:
        own, beyond = kinds["all"], [*beyond, f"chip {chip}"]
    factors = {name: own[name] for name in QUANTITIES}
    if beyond:
        factors = {name: max(BEYOND, factor) for name, factor in factors.items()}
    return Band(count=own["count"], others=others, beyond=", ".join(beyond), **factors)


def deployment_band(deployment: Deployment, shape: Shape, requests: float) -> Band:
    """`band_of` a deployment with `requests` on each tensor group of a shape. No pools were among the measured
    settings."""
    d = deployment
    return band_of_work(d.workload, d.cluster, d.traffic, shape, requests, d.work)


def band_of_work(
    workload: Workload, cluster: Cluster, traffic: Traffic, shape: Shape, requests: float, work: str
) -> Band:
    """`band_of` a shape with `requests` on each tensor group that does this part of their `work`
    (`planner.plan.deployment.WORKS`)."""
    band = band_of(workload, cluster, shape, requests, traffic.prompt)
    return band if work == "all" else band.beyond_by(POOLS_BAND)


def _beyond(
    limits: dict, workload: Workload, cluster: Cluster, shape: Shape, requests: float, prompt: float
) -> list[str]:
    """The ways in which a prediction leaves what was measured."""
    devices, found = len(shape.roles), []
    if shape.arch != "collocated":
        found.append(f"{shape.arch} ranks")
    if devices > limits["devices"]:
        found.append(f"{devices:,} devices, measured up to {limits['devices']}")
    elif len(cluster.domains("host")) > 1:
        found.append("more than one host")
    if requests > limits["requests"]:
        found.append(f"{requests:,.0f} requests a group, measured up to {limits['requests']}")
    if prompt > limits["prompt"]:
        found.append(f"prompts of {prompt:,.0f}, measured up to {limits['prompt']:,}")
    if (size := workload.all_bytes) < limits["bytes"] / SMALLER:
        found.append(f"{size / 1e9:.2g} GB of weights, measured from {limits['bytes'] / 1e9:.2g}")
    if workload.drafts:
        found.append("drafted tokens")
    if workload.weight_format not in limits["formats"]:
        found.append(f"{workload.weight_format} weights, measured {', '.join(limits['formats'])}")
    return found
