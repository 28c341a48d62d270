"""Pictures of a plan and of the cost of its losses, as PNG or SVG (needs matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from planner.cli.report import smallest
from planner.cost.design import Design
from planner.cost.trade_off import decode_speed
from planner.errors import InputError
from planner.failures.loss_forecast import worst_by_kind
from planner.failures.loss_model import LossModel, LossOutcome
from planner.plan.deployment import Deployment
from planner.solver.balance import relative_rank_loads
from planner.solver.shapes import memory_budget

INK, MILD, WARM, COOL = "#1b2a38", "#9fb3c8", "#d1495b", "#2e86ab"
COLOURS = (COOL, "#edae49", "#66a182", MILD, "#8d6a9f", "#c98b6b")


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure to `path`; the suffix chooses the format. InputError when the folder cannot be made."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--pictures: cannot make the folder {path.parent}: {error.strerror}") from None
    figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def _axes(title: str, x: str, y: str, *, size: tuple[float, float] = (7.2, 4.0)) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, color=INK, fontsize=11, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def placement(deployment: Deployment) -> Figure:
    """A heat map of each rank's expert traffic on each MoE layer, with hosts marked."""
    plan = deployment.plan
    load = relative_rank_loads(plan, deployment.load_array())
    title = f"{deployment.workload.name}: expert traffic by rank (1 = even), hottest {load.max():.2f}"
    figure, axes = _axes(title, "rank, in slot order", "MoE layer", size=(9, 4))
    span = max(0.05, float(np.abs(load - 1).max()))
    image = axes.imshow(load, aspect="auto", cmap="RdBu_r", vmin=1 - span, vmax=1 + span, interpolation="nearest")
    hosts = [r.host for r in plan.expert_ranks]
    edges = [i for i in range(1, len(hosts)) if hosts[i] != hosts[i - 1]]
    if len(edges) <= 64:
        for i in edges:
            axes.axvline(i - 0.5, color=MILD, linewidth=0.4)
    figure.colorbar(image, ax=axes, label="traffic, mean = 1")
    return figure


def memory(design: Design) -> Figure:
    """Memory of a device by use, for the best shapes compared; apart, an attention and an expert device of each."""
    room = memory_budget(design.deployment.cluster)
    shapes = [c for c in design.candidates if c.memory][:6]
    shown = [(c.shape.describe(), device, dict(uses)) for c in shapes for device, uses in c.memory_by_device().items()]
    figure, axes = _axes(
        f"memory of a device{smallest(design.deployment.cluster)}", "GB", "", size=(9, 0.6 * len(shown) + 1.6)
    )
    left = np.zeros(len(shown))
    for colour, (name, _) in zip(COLOURS, shapes[0].memory, strict=False):
        sizes = np.array([uses.get(name, 0) / 1e9 for _, _, uses in shown])
        axes.barh(range(len(shown)), sizes, left=left, color=colour, label=name)
        left += sizes
    if room:
        axes.axvline(room / 1e9, color=WARM, linestyle="--", label="for weights and cache")
    names = [shape if device == "a device" else f"{device}: {shape}" for shape, device, _ in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.invert_yaxis()
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=4)
    return figure


def trade_off(design: Design) -> Figure:
    """Tokens/s a device against tokens/s a user over shapes and batch sizes, with the front drawn."""
    front = design.pareto
    figure, axes = _axes("decode: what speed for a user costs", "tokens/s a user", "tokens/s a device")
    axes.plot([p["per_user"] for p in front], [p["per_device"] for p in front], "o-", color=COOL, markersize=4)
    chosen = design.chosen
    if chosen.step:
        speed = decode_speed(chosen.shape, chosen.requests_per_group, chosen.step, design.deployment.workload.kept)
        axes.plot(speed["per_user"], speed["per_device"], "D", color=WARM, label="chosen (decode alone)")
        axes.legend(frameon=False)
    axes.set_yscale("log")
    return figure


def capacity(losses: LossModel, *, most: int | None = None, tries: int = 5, seed: int = 0) -> Figure:
    """Throughput left against the number of devices lost at once, for random losses and for whole hosts."""
    plan = losses.deployment.plan
    ids = list(plan.rank_ids)
    most = most or max(1, len(ids) // 2)
    counts = sorted({round(c) for c in np.linspace(1, most, min(most, 12))})
    rng = np.random.default_rng(seed)
    figure, axes = _axes("throughput left after a loss", "devices lost at once", "part of tokens/s")
    left = {c: [losses.outcome(rng.choice(ids, c, replace=False).tolist()) for _ in range(tries)] for c in counts}
    for c, outcomes in left.items():
        for o in outcomes:
            axes.plot(c, o.capacity if o.survivable else 0.0, "o" if o.survivable else "x", color=COOL, alpha=0.6)
    mean = [float(np.mean([o.capacity if o.survivable else 0.0 for o in left[c]])) for c in counts]
    axes.plot([0, *counts], [1.0, *mean], color=COOL, label="random devices")
    hosts = list(losses.deployment.cluster.domains("host").values())
    points, dead = [(0, 1.0)], []
    for host in hosts:
        dead += [i for i in host if i in ids]
        if not dead or len(dead) > most:
            break
        outcome = losses.outcome(dead, kind="host")
        points.append((len(dead), outcome.capacity if outcome.survivable else 0.0))
    if len(points) > 1:
        axes.plot(*zip(*points, strict=True), "s--", color=WARM, markersize=4, label="whole hosts")
    axes.set_ylim(0, 1.05)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return figure


def time_line(outcomes: Sequence[LossOutcome]) -> Figure:
    """Phases of recovery for the worst loss of each kind: streams of survivors, then streams of dead ranks."""
    worst = worst_by_kind(outcomes)
    title = "worst loss of each kind, phase by phase"
    figure, axes = _axes(title, "milliseconds since the loss", "", size=(8, 0.7 * len(worst) + 1.6))
    for row, o in enumerate(worst.values()):
        start = 0.0
        for colour, (name, seconds) in zip(COLOURS, o.phases.items(), strict=False):
            axes.barh(row, seconds * 1e3, left=start, color=colour, label=name if row == 0 else None)
            start += seconds * 1e3
        axes.barh(
            row,
            o.moved_stall * 1e3 - start,
            left=start,
            color="none",
            edgecolor=INK,
            hatch="//",
            label="prefill of lost requests" if row == 0 else None,
        )
    axes.set_yticks(range(len(worst)), [f"{o.kind} {o.name}" for o in worst.values()])
    axes.invert_yaxis()
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=4)
    return figure


def draw_design(design: Design, folder: str | Path, kind: str = "png") -> list[Path]:
    """Draw placement (if there are experts), memory and trade-off of a design into `folder`; returns the paths."""
    figures = {"memory": memory(design), "pareto": trade_off(design)}
    if design.deployment.plan.experts:
        figures = {"placement": placement(design.deployment), **figures}
    return [save(figure, Path(folder) / f"{name}.{kind}") for name, figure in figures.items()]


def draw_losses(
    losses: LossModel, outcomes: Sequence[LossOutcome], folder: str | Path, kind: str = "png"
) -> list[Path]:
    """Draw capacity against losses and the phases of recovery into `folder`; returns the paths."""
    figures = {"capacity": capacity(losses), "recovery": time_line(outcomes)}
    return [save(figure, Path(folder) / f"{name}.{kind}") for name, figure in figures.items()]
