"""`python -m planner …` and `moejax plan …`: the arguments. What they do is in `commands.py`."""

from __future__ import annotations

import argparse
import json
import os
import sys

from planner import commands
from planner.degrade import REFUSABLE
from planner.errors import NoFeasiblePlan, PlannerError
from planner.export import FORMATS
from planner.rebalance import MODES
from planner.shape import ARCHITECTURES
from planner.solve import PROTECTION

DONE, INFEASIBLE, WRONG = 0, 1, 2


def main(argv: list[str] | None = None) -> int:
    """Run one command. 0: done and feasible; 1: infeasible, or a gate does not hold; 2: wrong input."""
    options = parser().parse_args(argv)
    try:
        answer = options.run(options)
    except PlannerError as error:
        if options.json:
            print(json.dumps({"error": str(error), "status": error.status}))
        print(f"moejax plan {options.command}: {error}", file=sys.stderr)
        return INFEASIBLE if isinstance(error, NoFeasiblePlan) else WRONG
    _say(json.dumps(answer.data) if options.json else answer.text)
    return DONE if answer.good else INFEASIBLE


def _say(text: str) -> None:
    """Print; a reader that leaves early (`| head`) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parser() -> argparse.ArgumentParser:
    """The argument parser of all commands."""
    top = argparse.ArgumentParser(
        prog="moejax plan",
        description="Meshes, expert placement, and what every loss would cost. No JAX needed.",
    )
    subs = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _solve(subs)
    _degrade(subs)
    _simulate(subs)
    _change(subs)
    _show(subs)
    return top


def _command(subs, name: str, run, text: str) -> argparse.ArgumentParser:
    p = subs.add_parser(name, help=text, description=text)
    p.add_argument("--json", action="store_true", help="machine-readable output")
    p.set_defaults(run=run)
    return p


def _solve(subs) -> None:
    p = _command(subs, "solve", commands.solve, "the best mesh and placement, and why the others lost")
    p.add_argument("model", help="preset (deepseek-v3), config.json, its folder, or a JSON of workload numbers")
    p.add_argument("cluster", help="preset (h200), preset with size (h200:40x8), TOML file, or plan file")
    p.add_argument("--traffic", help="prompt=2048,output=512,tpot_ms=50,ttft_ms=5000,rps=10")
    p.add_argument("--survive", help="ranks=2,hosts=1: losses without new weight buffers (default ranks=1)")
    p.add_argument("--arch", choices=ARCHITECTURES, default="collocated")
    p.add_argument("--protect", choices=PROTECTION, default="copies", help="against single losses, without the store")
    p.add_argument("--slots", type=int, help="slots per rank (default: the best that survives)")
    p.add_argument("--tensor", type=int, help="width of tensor groups (default: the best)")
    p.add_argument("--dense", type=int, help="width of dense FFN groups (default: the best)")
    p.add_argument("--standby", type=int, default=0, help="ranks that wait for a loss")
    p.add_argument("--weights", help="format of the weights, such as bfloat16, fp8, int8, mxfp4")
    p.add_argument("--cache", default="bfloat16", help="format of the cache (moejax serve: float32)")
    p.add_argument("--loads", help="JSON of measured expert loads [moe_layers][experts]")
    p.add_argument("--skew", type=float, help="instead of --loads: Zipf exponent of expert traffic")
    p.add_argument("--out", help="write the plan file that the other commands read")
    p.add_argument("--pictures", help="folder for placement, memory and trade-off pictures")
    p.add_argument("--svg", action="store_true", help="SVG instead of PNG")


def _degrade(subs) -> None:
    p = _command(subs, "degrade", commands.degrade, "what every loss costs")
    p.add_argument("plan", help="plan file of solve --out")
    p.add_argument("--kinds", default="rank,host,rack,pair", help="which losses (default: all kinds)")
    p.add_argument("--pairs", default="500", help="pairs looked at (a sample when there are more), or all")
    p.add_argument("--seed", type=int, default=0, help="of the sample")
    p.add_argument("--without", default="", help=f"means not allowed, of {', '.join(REFUSABLE)}")
    p.add_argument("--mask", action="store_true", help="mask experts that nothing else can bring back")
    p.add_argument("--measured", help="JSON of benchmarks.recovery: phases as measured")
    p.add_argument("--gate", help="'survivable>=1.0, worst_stall_ms<=500': exit code 1 unless it holds")
    p.add_argument("--pictures", help="folder for capacity and recovery pictures")
    p.add_argument("--svg", action="store_true", help="SVG instead of PNG")


def _simulate(subs) -> None:
    p = _command(subs, "simulate", commands.simulate, "months of failures under several policies")
    p.add_argument("plan", help="plan file of solve --out")
    p.add_argument("--days", type=float, default=90.0)
    p.add_argument("--mtbf", type=float, help="hours between failures of one device (default: the cluster's)")
    p.add_argument("--host-mtbf", type=float, help="hours between failures of one host")
    p.add_argument("--repair", type=float, help="mean hours until what failed is back")
    p.add_argument("--policies", help="restart,mask,copy,spare,switch (default: those that apply)")
    p.add_argument("--spares", type=int, help="standby ranks under the policy spare (default 1 %%)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--measured", help="JSON of benchmarks.recovery: phases as measured")


def _change(subs) -> None:
    p = _command(subs, "diff", commands.diff, "what moves between two plans")
    p.add_argument("plan_a", help="plan file")
    p.add_argument("plan_b", help="plan file of the same model")
    p = _command(subs, "rebalance", commands.rebalance, "experts moved towards measured loads")
    p.add_argument("plan", help="plan file")
    p.add_argument("loads", help="JSON of measured expert loads [moe_layers][experts]")
    p.add_argument("--mode", choices=MODES, default="global")
    p.add_argument("--moves", type=int, default=64, help="slots changed per layer, about")
    p.add_argument("--out", help="write the new plan file")


def _show(subs) -> None:
    p = _command(subs, "verify", commands.verify, "predictions against the compiler and measurements")
    p.add_argument("plan", help="plan file")
    p.add_argument("--aot", metavar="TOPOLOGY", help="compile for a topology such as v5e:2x4 (needs libtpu)")
    p.add_argument("--each-loss", action="store_true", help="compile what every loss leaves, not each size once")
    p.add_argument("--measured", help="JSON of benchmarks.throughput on this cluster")
    p.add_argument(
        "--out", help="write the plan file with what was found: hardware calibrated, figures of the compiler"
    )
    p = _command(subs, "buckets", commands.buckets, "shapes of a step that leave fewer rows empty")
    p.add_argument("counts", help="file that a server keeps of its steps, in the folder steps of its cache")
    p.add_argument("--current", help="buckets to compare with, as 2,0;8,2 (default: those of the last server)")
    p.add_argument("--count", type=int, help="most buckets (default: as many as now)")
    p = _command(subs, "export", commands.export, "the plan for those who start the ranks")
    p.add_argument("plan", help="plan file")
    p.add_argument("--to", choices=FORMATS, required=True)
    p.add_argument("--image", default="moejax:latest", help="container image (k8s)")
    p.add_argument("--name", default="moejax", help="name of the objects (k8s)")
    p = _command(subs, "explain", commands.explain, "one rank or expert in words")
    p.add_argument("plan", help="plan file")
    p.add_argument("what", nargs="+", help="`rank 3`, `expert 17` or `expert 17 layer 4`")
