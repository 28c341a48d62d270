"""Prints the tables of docs/scale.md from the measurements of `benchmarks.scale`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import numpy as np
from scipy.optimize import nnls

from benchmarks.scale_model import ScaledStep, scaled_recovery, shared_recovery, shared_step
from planner.cli.table import table
from planner.cost.front import CostCurve, FrontCost, constants_of, most_ranks
from planner.cost.roofline import prefill_time, step_time
from planner.cost.throughput import assess
from planner.errors import NoFeasiblePlan
from planner.inputs.cluster import Cluster, Hardware, read_cluster
from planner.inputs.published import read_model
from planner.inputs.recovery_times import RecoveryTimes
from planner.inputs.traffic import Traffic
from planner.inputs.workload import Workload
from planner.plan.shape import Shape
from planner.solver.shapes import slots_per_rank
from serving.executor.rank_monitor import MANY_POLLS, MANY_RANKS, POLL_S
from serving.launch.rank_listener import HEARTBEAT_S

SIZES = (4, 8, 32, 128, 320, 1000, 3200, 10000)
BIG, LOCAL = "deepseek-v3", "tiny"
"""The models with whose messages the front was measured, for the tables of a big model and of this machine."""
RECOVERY = RecoveryTimes()
OVERHEAD = 0.1
"""The front's share of a step that counts as small."""
GROUP = 8
"""Ranks of a host, and of each front in the table of many fronts."""
STREAMS, CONTEXT = 8, 160
PUBLISHED = ((16, 118, 195), (32, 155, 273), (64, 173, 314), (128, 192, 369), (256, 194, 360))
"""Ranks, and microseconds of a dispatch and a combine, 128 tokens a rank: DeepEP's low-latency kernels on H800 and
400 Gb/s InfiniBand (github.com/deepseek-ai/DeepEP, docs/legacy.md)."""
PUBLISHED_TOKENS = 128


def report(data: dict[str, Any], model: str, cluster: str) -> str:
    """All tables."""
    fronts = {name: front_of(measured, data["standing"]) for name, measured in data["fronts"].items()}
    big = fronts[BIG]
    sizes = [sized(n, model, cluster) for n in SIZES]
    parts = [
        f"measured {data['fronts_machine']['date'][:10]}, load average {data['fronts_machine']['load_before']}"
        + (f" ({note})" if (note := data.get("fronts_note")) else ""),
        f"\nThe front of {BIG}{_where(data, BIG)}: " + described(big),
        front_table(data["fronts"][BIG], big),
        f"\nThe front of {LOCAL}{_where(data, LOCAL)}: " + described(fronts[LOCAL]),
        f"\n{model} on {cluster}: a step",
        step_table(sizes, big),
        f"\n{model} on {cluster}: the loss of one rank, watching aside",
        recovery_table(sizes, big.unwatched()),
        "\nhow many ranks one front can have",
        limit_table(sizes, big),
        f"\na step with a front for every {GROUP} ranks, and one that leads them (not built)",
        group_table(sizes, big),
        "\none exchange of a MoE layer, there and back, and what is published for it",
        exchange_table(model, cluster),
    ]
    if "servers" in data:
        where = data["servers_machine"]
        parts += [
            f"\nservers on {where['cores']} cores, measured {where['date'][:10]}, load average {where['load_before']}",
            *local_tables(data["servers"], fronts[LOCAL], where["cores"]),
        ]
    return "\n".join(parts)


def _where(data: dict[str, Any], model: str) -> str:
    """Whether the ranks of a measured front were on hosts with an agent; empty where each had a stream of its own."""
    count = data.get("per_host", {}).get(model, 0)
    return f", ranks on hosts of {count}" if count else ""


def fit(columns: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Factors of the columns, none below 0, with the least sum of squared relative errors."""
    wanted = np.array(seconds)
    return nnls(np.array(columns, float).T / wanted[:, None], np.ones(len(wanted)))[0].tolist()


def front_of(measured: dict[str, list[dict[str, float]]], idle: dict[str, float]) -> FrontCost:
    """The costs of the front, fitted to measurements on simulated ranks."""
    steps, rounds = measured["steps"], measured["rounds"]
    ranks, ones = [row["ranks"] for row in steps], [1.0] * len(steps)
    fixed, each, row = fit([ones, ranks, [r["rows"] for r in steps]], [r["core_ms"] / 1e3 for r in steps])
    ranks, ones = [r["ranks"] for r in rounds], [1.0] * len(rounds)
    abort = fit([ones, ranks], [r["abort_ms"] / 1e3 for r in rounds])
    prepare, adopt = (
        fit([ones, ranks, [n * n for n in ranks]], [r[name] / 1e3 for r in rounds])
        for name in ("prepare_ms", "adopt_ms")
    )
    return FrontCost(
        step=CostCurve(fixed=fixed, each=each),
        row=row,
        abort=CostCurve(fixed=abort[0], each=abort[1]),
        prepare=CostCurve(fixed=prepare[0], each=prepare[1], pair=prepare[2]),
        adopt=CostCurve(fixed=adopt[0], each=adopt[1], pair=adopt[2]),
        beat=idle["beat_ms"] / 1e3,
        look=idle["look_ms"] / 1e3,
        beat_s=HEARTBEAT_S,
        look_s=POLL_S,
        look_many_s=MANY_POLLS * POLL_S,
        many_ranks=MANY_RANKS,
    )


def fitted(data: dict[str, Any]) -> dict[str, Any]:
    """The constants of the fronts for the planner (configs/front.json): seconds, by model and its pairs of experts."""
    rows = []
    for name, measured in data["fronts"].items():
        model = Workload(**data["servers"][name]["workload"]) if name in data["servers"] else read_model(name)
        pairs = model.moe_layers * model.experts
        rows.append({"model": name, "pairs": pairs, "constants": constants_of(front_of(measured, data["standing"]))})
    machine = data["fronts_machine"]
    return {"by": "python -m benchmarks.scale --fit", "measured": machine["date"][:10], "fronts": rows}


def described(front: FrontCost) -> str:
    """The fitted lines as formulas."""
    s, a, p, d = front.step, front.abort, front.prepare, front.adopt
    return (
        f"milliseconds of a core for n ranks and r tokens\n"
        f"  step     {s.fixed * 1e3:.2f} + {s.each * 1e3:.3f} n + {front.row * 1e3:.3f} r\n"
        f"  abort    {a.fixed * 1e3:.2f} + {a.each * 1e3:.3f} n\n"
        f"  prepare  {p.fixed * 1e3:.2f} + {p.each * 1e3:.3f} n + {p.pair * 1e6:.2f} n^2 / 1000\n"
        f"  adopt    {d.fixed * 1e3:.2f} + {d.each * 1e3:.3f} n + {d.pair * 1e6:.2f} n^2 / 1000\n"
        f"  a heartbeat {front.beat * 1e3:.3f}, every {front.beat_s * 1e3:.0f} ms; "
        f"a look at a rank {front.look * 1e3:.4f}, every {front.look_s * 1e3:.0f} ms: "
        f"{front.watch_share(1):.3%} of a core for each rank\n"
        f"  above {front.many_ranks} ranks a look every {front.look_many_s * 1e3:.0f} ms: "
        f"{front.watch_share(front.many_ranks + 1) / (front.many_ranks + 1):.3%} of a core for each rank"
    )


def front_table(measured: dict[str, list[dict[str, float]]], front: FrontCost) -> str:
    """Each measurement beside its line."""
    rounds = {row["ranks"]: row for row in measured["rounds"]}
    losses = {row["ranks"]: row for row in measured["losses"]}
    rows, seen = [], set()
    for step in measured["steps"]:
        n = int(step["ranks"])
        line = front.step.at(n) + front.row * step["rows"]
        cells = [n, int(step["rows"]), f"{step['core_ms']:.1f}", f"{1e3 * line:.1f}"]
        if n not in seen:
            round_, loss = rounds[n], losses[n]
            for name, line in (("abort", front.abort), ("prepare", front.prepare), ("adopt", front.adopt)):
                cells += [f"{ms:.1f}" for ms in (round_[f"{name}_ms"], 1e3 * line.at(n))]
            cells += [f"{loss[name]:.1f}" for name in ("core_ms", "total")]
        seen.add(n)
        rows.append(cells + ["-"] * (12 - len(cells)))
    rounds_ = [x for name in ("step", "abort", "prepare", "adopt") for x in (name, "by line")]
    return table(["ranks", "tokens", *rounds_, "a loss", "on the clock"], rows)


@dataclass(frozen=True)
class Sized:
    """One row of the big tables: a model on a number of ranks, with as many requests on each as fit. Without a step the
    model does not fit, and `reason` says why."""

    ranks: int
    workload: Workload
    cluster: Cluster
    shape: Shape | None = None
    requests: int = 0
    step: Any = None
    prefill: float = 0.0
    reason: str = ""

    def scaled(self, front: FrontCost, requests: int | None = None) -> ScaledStep:
        """The time of a step with the front's part."""
        return ScaledStep(
            ranks=self.step, front=front.step_seconds(self.ranks, self.ranks * (requests or self.requests))
        )


def collocated(ranks: int, slots: int) -> Shape:
    """The shape in which every rank computes attention alone and holds `slots` experts a layer."""
    roles, groups = ("collocated",) * ranks, tuple(range(ranks))
    return Shape(arch="collocated", tensor=1, dense=1, slots=slots, roles=roles, groups=groups)


def served_hardware(cluster: str) -> Hardware:
    """The hardware of a preset with the constants of moejax's own steps, since its front is what these tables scale."""
    return replace(read_cluster(cluster).hardware, engine="jax")


def sized(ranks: int, model: str, cluster: str) -> Sized:
    """The model on that many devices, 8 to a host, with the planner's slots and its default traffic."""
    workload, hardware = read_model(model), served_hardware(cluster)
    there = Cluster.regular(cluster, -(-ranks // 8), min(8, ranks), hardware=hardware, hosts_per_rack=4)
    traffic = Traffic()
    try:
        slots = slots_per_rank(workload, there, ranks, asked=None, before=None, survive_ranks=1)
    except NoFeasiblePlan as error:
        return Sized(ranks, workload, there, reason=str(error))
    shape = collocated(ranks, slots)
    found = assess(workload, there, shape, traffic)
    if found.step is None:
        return Sized(ranks, workload, there, reason=found.reason)
    prefill = prefill_time(workload, there, shape, round(traffic.context))
    return Sized(ranks, workload, there, shape, found.requests_per_group, found.step, prefill)


def step_table(sizes: Iterable[Sized], front: FrontCost) -> str:
    """The time of a step on the ranks and in the front."""
    rows = []
    for at in sizes:
        if at.step is None:
            rows.append([at.ranks, "does not fit", *["-"] * 10])
            continue
        scaled, parts = at.scaled(front), at.step
        rows.append(
            [
                f"{at.ranks:,}",
                at.shape.slots if at.shape else 0,
                at.requests,
                *(milliseconds(s) for s in (parts.attention, parts.experts, parts.exchange, parts.total)),
                f"{front.watch_share(at.ranks):.0%}",
                milliseconds(at.scaled(front.unwatched()).front),
                milliseconds(scaled.front),
                milliseconds(scaled.ahead),
                milliseconds(scaled.in_turn),
            ]
        )
    head = ["ranks", "slots", "requests a rank", "attention", "experts", "exchange", "ranks' step"]
    return table([*head, "watching", "front", "beside watching", "ahead", "in turn"], rows)


def recovery_table(sizes: Iterable[Sized], front: FrontCost) -> str:
    """The time of a recovery from the loss of one rank."""
    rows = []
    for at in sizes:
        if at.step is None or at.shape is None:
            rows.append([at.ranks, "does not fit", *["-"] * 10])
            continue
        t = scaled_recovery(
            at.workload,
            at.cluster,
            at.shape,
            front,
            RECOVERY,
            step=at.scaled(front).in_turn,
            requests=at.requests,
            prefill=at.prefill,
        )
        phases = (t.detect, t.abort, t.abort_messages, t.adopt, t.adopt_messages, t.weights, t.resume)
        ready = front.preparing(at.ranks, at.ranks + len(at.cluster.domains("host")))
        cells = map(milliseconds, (*phases, t.stall, t.replay, t.moved_stall))
        rows.append([f"{at.ranks:,}", *cells, "never" if ready == inf else f"{ready:,.1f} s"])
    head = ["ranks", "detect", "abort", "messages", "adopt", "messages", "weights", "a step", "all others"]
    return table([*head, "replay", "its own", "prepared in"], rows)


def limit_table(sizes: Sequence[Sized], front: FrontCost) -> str:
    """The number of ranks for which one front is enough, by requests on each, compared with a step on 320 ranks."""
    at = next(s for s in sizes if s.ranks == 320 and s.step is not None)
    rows = []
    for requests in sorted({1, 8, at.requests}):
        step = step_time(at.workload, at.cluster, at.shape, requests, Traffic().context).total
        cells = [str(requests), milliseconds(step)]
        for cost in (front, front.unwatched()):
            for share in (OVERHEAD, 1.0):
                within = lambda n, c=cost, s=share: c.step_seconds(n, n * requests) <= s * step  # noqa: E731, B023
                cells.append(f"{most_ranks(within):,}")
        rows.append(cells)
    alone = most_ranks(lambda n: front.watch_share(n) < 1)
    head = ["requests a rank", "ranks' step", "front <= 10%", "front <= a step", "unwatched: <= 10%", "<= a step"]
    return table(head, rows) + f"\nwatching alone takes the whole core at {alone:,} ranks"


def group_table(sizes: Iterable[Sized], front: FrontCost) -> str:
    """A step when every `GROUP` ranks have a front of their own, and a leading front exchanges messages with each."""
    rows = []
    for at in sizes:
        if at.step is None:
            continue
        fronts = -(-at.ranks // GROUP)
        own = front.step_seconds(min(at.ranks, GROUP), min(at.ranks, GROUP) * at.requests)
        lead = front.busy(fronts, front.prepare.fixed + front.prepare.each * fronts)
        ahead = max(at.step.total, own, lead)
        cells = [milliseconds(s) for s in (at.step.total, own, lead, ahead)]
        over = "-" if ahead == inf else f"{ahead / at.step.total:.2f}"
        rows.append([f"{at.ranks:,}", f"{fronts:,}", *cells, over])
    return table(["ranks", "fronts", "ranks' step", "a front", "the lead", "ahead", "over the ranks'"], rows)


def exchange_table(model: str, cluster: str) -> str:
    """The planner's exchange beside DeepEP's."""
    workload, hardware = read_model(model), served_hardware(cluster)
    rows = []
    for ranks, dispatch, combine in PUBLISHED:
        there = Cluster.regular(cluster, -(-ranks // 8), 8, hardware=hardware)
        slots = -(-workload.experts // ranks)
        step = step_time(workload, there, collocated(ranks, slots), PUBLISHED_TOKENS, Traffic().context)
        each, published = 1e6 * step.exchange / workload.moe_layers, dispatch + combine
        rows.append([ranks, f"{each:.0f}", published, f"{each / published:.2f}"])
    return table(["ranks", "planner, us", "published, us", "ratio"], rows)


def local_tables(servers: dict[str, Any], front: FrontCost, cores: int) -> list[str]:
    """Predicted beside measured, on this machine."""
    hardware = read_cluster("cpu").hardware
    steps, recoveries = [], []
    for name, server in servers.items():
        workload, measured = Workload(**server["workload"]), {row["ranks"]: row for row in server["rows"]}
        predict = local_steps(workload, hardware, front, measured, cores)
        for n, row in measured.items():
            predicted = 1e3 * predict(n)
            ratio = f"{predicted / row['step_ms']:.2f}"
            steps.append([name, n, f"{predicted:.1f}", f"{row['step_ms']:.1f}", ratio])
        small = measured[2]["recovery_ms"]
        alone = sum(small[phase] for phase in ("fence", "plan", "adopt")) / 1e3 - messages(front, 1)
        for n, row in measured.items():
            if n < 2:
                continue
            phases = row["recovery_ms"]
            predicted = 1e3 * shared_recovery(alone, messages(front, n - 1), predict(n - 1), n - 1, cores)
            took = sum(phases[phase] for phase in ("fence", "plan", "adopt", "resume"))
            cells = [f"{phases['detect']:.1f}", f"{predicted:.1f}", f"{took:.1f}", f"{predicted / took:.2f}"]
            recoveries.append([name, n, *cells, f"{phases['from_kill']:.1f}"])
    head = ["model", "ranks", "predicted", "measured", "ratio"]
    more = ["model", "ranks", "detected in", "predicted", "measured", "ratio", "from the kill"]
    return [
        "a step of 8 streams, milliseconds",
        table(head, steps),
        "from detection to the first step after it, milliseconds",
        table(more, recoveries),
    ]


def messages(front: FrontCost, survivors: int) -> float:
    """Seconds of both rounds of a recovery."""
    return front.abort.at(survivors) + front.adopt.at(survivors)


def local_steps(workload: Workload, hardware: Any, front: FrontCost, measured: dict[int, Any], cores: int) -> Any:
    """Seconds of a step by ranks; work is scaled so that one rank's is what the cores spent on it."""

    def described(n: int) -> Any:
        cluster = Cluster(name="local", devices=Cluster.local(n).devices, hardware=hardware)
        slots = min(workload.experts, -(-2 * workload.experts // n))
        return step_time(workload, cluster, collocated(n, slots), STREAMS / n, CONTEXT)

    def front_work(n: int) -> float:
        return front.step.at(n) + front.row * STREAMS

    one, beside = measured[1], measured[1]["client_core_ms"] / 1e3
    factor = max(0.0, one["server_core_ms"] / 1e3 - front_work(1)) / (described(1).total - described(1).exchange)
    return lambda n: shared_step(described(n), front_work(n), beside, n, cores, factor=factor)


def milliseconds(seconds: float) -> str:
    """The text of a table cell; "never" for infinite times."""
    ms = 1e3 * seconds
    return "never" if seconds == inf else f"{ms:.1f}" if ms < 100 else f"{ms:,.0f}"
