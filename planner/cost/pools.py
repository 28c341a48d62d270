"""Pools for prompts and for decode (P/D): how many hosts each gets, and what this gains.

Prompts are computed by instances of equal size, answers by one instance on the other hosts. The KV cache of a prompt is
sent over the network before its first token. The slower side sets the rate, so that sizes are chosen for which both
sides have nearly the same; running streams wait for no prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf

from planner.cost.band import Band, deployment_band
from planner.cost.design import Design, best_candidate, design
from planner.cost.mixed import assess_kinds
from planner.cost.roofline import first_token_time
from planner.cost.throughput import Candidate, cache_transfer_seconds
from planner.errors import InputError, NoFeasiblePlan
from planner.inputs.cluster import Cluster, Device
from planner.inputs.traffic import Traffic
from planner.inputs.workload import Workload
from planner.plan.deployment import Deployment
from planner.plan.plan import Figure
from planner.plan.pools import PooledDeployment

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Hosts of a prefill instance that are tried."""


@dataclass(frozen=True, kw_only=True)
class PoolRates:
    """The rates that pools reach together, in requests/s, seconds and bytes.

    `prompts` and `decode` are the rates of either side, `network` that at which caches fill the network of the smaller
    side; `rate` is the least of them. `ttft` ends with the first decode step.
    """

    prompts: float
    decode: float
    network: float
    ttft: float
    tpot: float
    transfer_bytes: float
    transfer_seconds: float

    @property
    def rate(self) -> float:
        """Requests/s of all pools together."""
        return min(self.prompts, self.decode, self.network)


@dataclass(frozen=True, kw_only=True)
class PooledDesign:
    """The chosen pools with their predictions: `prefill` is the design of each of `instances` prefill instances.

    `splits` are the splits compared, best first, as (hosts of a prefill instance, instances, hosts for decode, rates).
    """

    deployment: PooledDeployment
    prefill: Design
    instances: int
    decode: Design
    rates: PoolRates
    splits: tuple[tuple[int, int, int, PoolRates], ...]

    @property
    def tokens_per_second(self) -> float:
        """Tokens/s of all answers."""
        return self.rates.rate * self.decode.deployment.traffic.output

    @property
    def tokens_per_second_per_user(self) -> float:
        """Tokens/s of a stream."""
        return 1 / self.rates.tpot

    def band(self) -> Band:
        """How far off the figures may be: no pools were among the measured settings."""
        return self.decode.band(self.decode.chosen)

    def ranges(self, rates: PoolRates | None = None) -> dict:
        """The figures of a split (None: the chosen one) as {low, mid, high}, and the band's source, for JSON."""
        band, rates = self.band(), rates or self.rates
        figures = {
            "tpot_s": band.around(rates.tpot, "tpot"),
            "ttft_s": band.around(rates.ttft, "ttft"),
            "tokens_per_second": band.around(rates.rate * self.decode.deployment.traffic.output, "rate"),
            "tokens_per_second_per_user": band.around(1 / rates.tpot, "tpot"),
            "requests_per_second_of_prompts": band.around(rates.prompts, "rate"),
            "requests_per_second_of_decode": band.around(rates.decode, "rate"),
            "transfer_s": band.around(rates.transfer_seconds, "ttft"),
        }
        return {"band": band.to_dict(), "ranges": figures}


def design_pools(workload: Workload, cluster: Cluster, *, traffic: Traffic | None = None, **options) -> PooledDesign:
    """The split of the cluster's hosts (of its devices, on one host) with the most tokens/s that meets `traffic`.

    `options` are those of `design`; every instance tolerates the losses that are asked for by itself. Raises
    NoFeasiblePlan, with the nearest reason, when no split will do.
    """
    traffic = traffic or Traffic()
    units = _units(cluster)
    if len(units) < 2:
        raise InputError(f"{cluster.name} has {len(cluster.devices)} device; pools for prompts and decode need two")
    if not workload.cache_bytes_per_token:
        raise InputError(f"{workload.name}: the size of its KV cache is not known, which pools send to each other")
    splits = _Splits(workload, cluster, units, traffic, options)
    found = sorted(splits.all(), key=lambda split: splits.order(split[3]))
    if not found or found[0][3].rate * traffic.output <= 0 or splits.order(found[0][3])[0]:
        raise NoFeasiblePlan(
            f"{workload.name} on {len(cluster.devices)} devices of {cluster.name}: {splits.why()}. "
            "Add devices, relax a limit, or solve with --arch collocated."
        )
    size, instances, rest, _ = found[0]
    decode = design(workload, splits.part(0, rest), traffic=traffic, work="decode", **options)
    starts = [rest + i * size for i in range(instances)]
    prompts = [
        design(workload, splits.part(start, start + size), traffic=traffic, work="prompts", **options)
        for start in starts
    ]
    rates = splits.rates(prompts[0].chosen, instances, decode.chosen)
    deployment = PooledDeployment(
        prefill=tuple(each.deployment for each in prompts),
        decode=decode.deployment,
        figures=_figures(rates, traffic, len(cluster.devices), decode.band(decode.chosen)),
    )
    return PooledDesign(
        deployment=deployment,
        prefill=prompts[0],
        instances=instances,
        decode=decode,
        rates=rates,
        splits=tuple(found),
    )


def pool_rates(
    workload: Workload, cluster: Cluster, traffic: Traffic, prompts: Candidate, instances: int, decode: Candidate
) -> PoolRates:
    """The rates of `instances` instances that compute `prompts` beside one that does `decode`."""
    lanes = min(prompts.shape.tensor, decode.shape.tensor, workload.cache_splits)
    sent = cache_transfer_seconds(workload, cluster, traffic.prompt, lanes=lanes)
    step = decode.step.total if decode.step else 0.0
    alone = prompts.ttft_seconds - cache_transfer_seconds(workload, cluster, traffic.prompt)
    ports = min(instances * len(prompts.shape.roles), len(decode.shape.roles))
    return PoolRates(
        prompts=instances * prompts.tokens_per_second / traffic.output,
        decode=decode.tokens_per_second / traffic.output,
        network=cache_network_rate(workload, cluster, traffic, ports),
        ttft=first_token_time(workload, cluster, alone + sent, step),
        tpot=1 / decode.tokens_per_second_per_user if decode.tokens_per_second_per_user else inf,
        transfer_bytes=workload.cache_bytes(traffic.prompt),
        transfer_seconds=sent,
    )


def cache_network_rate(workload: Workload, cluster: Cluster, traffic: Traffic, ports: int) -> float:
    """Requests/s whose KV caches fill `ports` network ports."""
    return ports * cluster.hardware.network_bandwidth / workload.cache_bytes(traffic.prompt)


def with_figures(pooled: PooledDeployment) -> PooledDeployment:
    """The plan with the predictions for all pools together, as those of a plan in force are; without where a side has
    no room for a request."""
    d, instances = pooled.decode, len(pooled.prefill)
    decode, prompts = (_assessed(each) for each in (d, pooled.prefill[0]))
    if decode.reason or prompts.reason:
        return pooled
    rates = pool_rates(d.workload, d.cluster, d.traffic, prompts, instances, decode)
    devices = sum(len(each.plan.ranks) for each in pooled.pools().values())
    band = deployment_band(d, d.shape, decode.requests_per_group)
    return replace(pooled, figures=_figures(rates, d.traffic, devices, band))


def _assessed(d: Deployment) -> Candidate:
    return assess_kinds(d.workload, d.cluster, d.shape, d.traffic, peak=d.plan.figure("peak_load", 1.0), work=d.work)


def _units(cluster: Cluster) -> list[tuple[Device, ...]]:
    """The devices of each host; each device for itself where there is one host."""
    hosts: dict[str, list[Device]] = {}
    for device in cluster.devices:
        hosts.setdefault(device.host, []).append(device)
    if len(hosts) == 1:
        return [(device,) for device in cluster.devices]
    return [tuple(devices) for devices in hosts.values()]


class _Splits:
    """Rates of all splits of a cluster; each size of an instance is assessed once."""

    def __init__(
        self,
        workload: Workload,
        cluster: Cluster,
        units: list[tuple[Device, ...]],
        traffic: Traffic,
        options: dict,
    ) -> None:
        self.workload, self.cluster, self.units, self.traffic, self.options = workload, cluster, units, traffic, options
        self.best: Callable[[int, str], Candidate] = lru_cache(self._best)
        self.reasons: dict[tuple[int, str], str] = {}

    def part(self, begin: int, end: int) -> Cluster:
        """The cluster of the units from `begin` to `end`."""
        devices = tuple(device for unit in self.units[begin:end] for device in unit)
        return replace(self.cluster, devices=devices)

    def _best(self, units: int, work: str) -> Candidate:
        at = len(self.units) - units if work == "prompts" else 0
        best = best_candidate(
            self.workload, self.part(at, at + units), traffic=replace(self.traffic, rps=None), work=work, **self.options
        )
        if best.reason:
            self.reasons[units, work] = best.reason
        return best

    def why(self) -> str:
        """The reasons of the largest pools that were too small."""
        parts = []
        for work in ("prompts", "decode"):
            sizes = [units for units, each in self.reasons if each == work]
            if sizes:
                parts.append(f"{max(sizes)} hosts for {work}: {self.reasons[max(sizes), work]}")
        return "; ".join(parts) or "no split leaves hosts for both prompts and decode"

    def rates(self, prompts: Candidate, instances: int, decode: Candidate) -> PoolRates:
        """The rates of `instances` prefill instances beside one for decode."""
        return pool_rates(self.workload, self.cluster, self.traffic, prompts, instances, decode)

    def all(self) -> Iterator[tuple[int, int, int, PoolRates]]:
        """For each size of a prefill instance, the numbers of instances around that at which both sides are as fast."""
        for size in (size for size in SIZES if size < len(self.units)):
            prompts = self.best(size, "prompts")
            if prompts.reason:
                continue
            most = (len(self.units) - 1) // size
            low, high = 1, most
            while low < high:  # the least number of instances with which prompts are no longer the slower side
                middle = (low + high) // 2
                low, high = (low, middle) if self._prompts_lead(prompts, middle, size) else (middle + 1, high)
            for instances in {max(1, low - 1), low}:
                rest = len(self.units) - instances * size
                decode = self.best(rest, "decode")
                if not decode.reason:
                    yield size, instances, rest, self.rates(prompts, instances, decode)

    def _prompts_lead(self, prompts: Candidate, instances: int, size: int) -> bool:
        decode = self.best(len(self.units) - instances * size, "decode")
        return bool(decode.reason) or instances * prompts.tokens_per_second >= decode.tokens_per_second

    def order(self, rates: PoolRates) -> tuple:
        """Best first: splits that meet the traffic, with the most requests/s, or the fastest for a user."""
        traffic = self.traffic
        missed = rates.ttft * 1e3 > traffic.ttft_ms or (traffic.rps is not None and rates.rate < traffic.rps)
        return (missed, rates.tpot if traffic.rps is not None else 0.0, -rates.rate, rates.ttft)


def _figures(rates: PoolRates, traffic: Traffic, devices: int, band: Band) -> tuple[Figure, ...]:
    """The predictions for all pools together; every figure is an estimate, and times and rates have the ends of their
    band."""
    rows = [
        ("requests_per_second", rates.rate, "requests/s", "rate"),
        ("requests_per_second_of_prompts", rates.prompts, "requests/s", "rate"),
        ("requests_per_second_of_decode", rates.decode, "requests/s", "rate"),
        ("tokens_per_second", rates.rate * traffic.output, "tokens/s", "rate"),
        ("tokens_per_second_per_device", rates.rate * traffic.output / devices, "tokens/s", "rate"),
        ("tokens_per_second_per_user", 1 / rates.tpot, "tokens/s", "tpot"),
        ("ttft", rates.ttft, "s", "ttft"),
        ("tpot", rates.tpot, "s", "tpot"),
        ("transfer", rates.transfer_seconds, "s", "ttft"),
        ("transfer_bytes", rates.transfer_bytes, "bytes", ""),
        ("network_share", rates.rate / rates.network, "of the network of the smaller side", "rate"),
    ]
    return tuple(band.figure(*row) for row in rows)
