"""Arguments of `python -m planner …` and `moejax plan …`; `commands.py` has the commands."""

from __future__ import annotations

import argparse
import json
import os
import sys

from planner.cli import certify, commands
from planner.cli.accuracy import accuracy
from planner.cli.diff import diff
from planner.cli.html_report import report
from planner.cli.kubernetes import FORMATS
from planner.cli.solve import ARCHS, solve
from planner.cli.table import folded, terminal_width
from planner.errors import NoFeasiblePlan, PlannerError
from planner.failures.loss_model import OPTIONAL_MEANS
from planner.inputs.cluster import STORES
from planner.inputs.engine import engine_names
from planner.solver.problem import PROTECTION
from planner.solver.rebalance import MODES

DONE, INFEASIBLE, WRONG = 0, 1, 2


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 feasible; 1 infeasible, or a gate does not hold; 2 wrong input.
    Without arguments the commands are listed."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        parser().print_help()
        return DONE
    options = parser().parse_args(arguments)
    try:
        answer = options.run(options)
    except PlannerError as error:
        if options.json:
            print(json.dumps({"error": str(error), "status": error.status}))
        print(f"moejax plan {options.command}: {error}", file=sys.stderr)
        return INFEASIBLE if isinstance(error, NoFeasiblePlan) else WRONG
    text = answer.text if answer.verbatim else folded(answer.text, terminal_width())
    _print(json.dumps(answer.data) if options.json else text)
    return DONE if answer.good else INFEASIBLE


def _print(text: str) -> None:
    """Print the text. A reader that closes the pipe early (`| head`) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parser() -> argparse.ArgumentParser:
    """The argument parser of all commands."""
    top = argparse.ArgumentParser(
        prog="moejax plan",
        description="Plan meshes and expert placement, and forecast the cost of every loss. Needs no JAX.",
    )
    subs = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _solve(subs)
    _degrade(subs)
    _certify(subs)
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
    p = _command(subs, "solve", solve, "Find the best mesh and placement, and say why the other shapes lost.")
    p.add_argument("model", help="preset (deepseek-v3), config.json, its folder, or a JSON of workload numbers")
    p.add_argument("cluster", help="preset (h200), preset with size (h200:40x8), TOML file, or plan file")
    p.add_argument("--traffic", help="prompt=2048,output=512,tpot_ms=50,ttft_ms=5000,rps=10,cached=0.5")
    p.add_argument(
        "--survive",
        help="losses that the placement survives without new weight buffers, as ranks=2,hosts=1 (default: ranks=1)",
    )
    p.add_argument(
        "--arch",
        choices=ARCHS,
        default="collocated",
        help="attention and experts on the same ranks, or on ranks of their own; prompts and decode on pools of "
        "their own (pd); or the best of all (auto)",
    )
    p.add_argument(
        "--protect",
        choices=PROTECTION,
        default="copies",
        help="how single losses are survived without the store: second copies, parity slots, or not at all",
    )
    p.add_argument("--slots", type=int, help="slots per rank (default: the best number that survives those losses)")
    p.add_argument("--tensor", type=int, help="ranks of a tensor group (default: the best width)")
    p.add_argument("--dense", type=int, help="ranks over which dense layers are sharded (default: the best width)")
    p.add_argument("--standby", type=int, default=0, help="number of ranks that wait for a loss")
    p.add_argument(
        "--weights", help="format of the weights, such as bfloat16, fp8, int8, mxfp4 (default: that of the config)"
    )
    p.add_argument(
        "--mtp",
        metavar="drafts=1,accepted=0.8",
        help="tokens drafted in each step by the model's own layer (moejax serve --speculate mtp), and the share of "
        "them that is kept",
    )
    p.add_argument(
        "--ngram",
        metavar="drafts=3,accepted=0.6",
        help="tokens drafted in each step from a request's own text (moejax serve --speculate ngram), and the share of "
        "them that is kept",
    )
    p.add_argument("--engine", choices=engine_names(), help="constants of a step (default: those of the cluster)")
    p.add_argument("--cache", default="bfloat16", help="format of the KV cache, as moejax serve --kv-cache-type")
    p.add_argument("--loads", help="JSON of measured expert loads [moe_layers][experts]")
    p.add_argument("--skew", type=float, help="Zipf exponent of expert traffic, instead of --loads")
    p.add_argument("--out", help="write the plan file that the other commands read")
    p.add_argument("--pictures", help="folder to draw pictures into: placement, memory, trade-off")
    p.add_argument("--svg", action="store_true", help="draw SVG instead of PNG")


def _degrade(subs) -> None:
    p = _command(subs, "degrade", commands.degrade, "Forecast the cost of every loss.")
    p.add_argument("plan", help="plan file of solve --out")
    p.add_argument("--kinds", default="rank,host,rack,pair", help="kinds of losses (default: all)")
    p.add_argument("--pairs", default="500", help="number of pairs of ranks to sample, or all")
    p.add_argument("--seed", type=int, default=0, help="random seed of the sample")
    p.add_argument("--without", default="", help=f"means of recovery to leave out, of {', '.join(OPTIONAL_MEANS)}")
    p.add_argument("--mask", action="store_true", help="mask experts that no other means restores")
    p.add_argument("--measured", help="JSON of benchmarks.recovery: phases as measured")
    p.add_argument("--store", choices=STORES, help="where lost experts are read from (default: as the cluster says)")
    p.add_argument(
        "--gate", help="conditions such as 'survivable>=1.0, worst_stall_ms<=500'; the exit code is 1 unless all hold"
    )
    p.add_argument("--pictures", help="folder to draw pictures into: capacity, recovery")
    p.add_argument("--svg", action="store_true", help="draw SVG instead of PNG")


def _certify(subs) -> None:
    p = _command(
        subs, "certify", certify.run, "Certify that every loss keeps service levels, or name one that does not."
    )
    p.add_argument("plan", help="plan file")
    p.add_argument("--survive", help="losses, as ranks=2,hosts=1 (default: those that the plan was made for)")
    p.add_argument("--slo", help="tpot_ms=50,stall_ms=500,moved_stall_ms=3000,capacity=0.9")
    p.add_argument("--load", type=float, default=1.0, help="share of the plan's requests that run (default: 1)")
    p.add_argument("--without", default="", help=f"means of recovery to leave out, of {', '.join(OPTIONAL_MEANS)}")
    p.add_argument("--without-front", action="store_true", help="leave out the work of the front")
    p.add_argument("--store", choices=STORES, help="where lost experts are read from (default: as the cluster says)")
    p.add_argument("--measured", help="JSON of benchmarks.recovery: phases as measured")
    p.add_argument("--key", metavar="FILE", help="key to sign with, or with --check to check with")
    p.add_argument("--out", metavar="FILE", help="write the certificate")
    p.add_argument("--check", metavar="FILE", help="check this certificate of the plan instead of making one")


def _simulate(subs) -> None:
    p = _command(subs, "simulate", commands.simulate, "Simulate months of failures under several policies.")
    p.add_argument("plan", help="plan file of solve --out")
    p.add_argument("--days", type=float, default=90.0, help="days to simulate (default: 90)")
    p.add_argument("--mtbf", type=float, help="hours between failures of one device (default: the cluster's)")
    p.add_argument("--host-mtbf", type=float, help="hours between failures of one host (default: the cluster's)")
    p.add_argument("--repair", type=float, help="mean hours of a repair (default: the cluster's)")
    p.add_argument(
        "--policies", help="policies to compare, of restart,mask,copy,spare,switch (default: all that apply)"
    )
    p.add_argument("--spares", type=int, help="standby ranks under the policy spare (default: 1 %% of the ranks)")
    p.add_argument("--without", default="", help=f"means of recovery to leave out, of {', '.join(OPTIONAL_MEANS)}")
    p.add_argument("--store", choices=STORES, help="where lost experts are read from (default: as the cluster says)")
    p.add_argument("--seed", type=int, default=0, help="random seed of the failures")
    p.add_argument("--measured", help="JSON of benchmarks.recovery: phases as measured")


def _change(subs) -> None:
    p = _command(subs, "diff", diff, "List the moves between two plans.")
    p.add_argument("plan_a", help="plan file")
    p.add_argument("plan_b", help="plan file of the same model")
    p = _command(subs, "rebalance", commands.rebalance, "Move experts towards measured loads.")
    p.add_argument("plan", help="plan file")
    p.add_argument("loads", help="JSON of measured expert loads [moe_layers][experts]")
    p.add_argument("--mode", choices=MODES, default="global", help="hierarchical moves experts within hosts only")
    p.add_argument("--moves", type=int, default=64, help="about how many slots of a layer may change (default: 64)")
    p.add_argument("--out", help="write the new plan file")


def _show(subs) -> None:
    p = _command(subs, "verify", commands.verify, "Compare predictions with the compiler and with measurements.")
    p.add_argument("plan", help="plan file")
    p.add_argument("--aot", metavar="TOPOLOGY", help="topology to compile for, such as v5e:2x4 (needs libtpu)")
    p.add_argument(
        "--each-loss", action="store_true", help="compile the mesh that every loss leaves, not each size once"
    )
    p.add_argument("--measured", help="JSON of benchmarks.throughput on this cluster")
    p.add_argument("--out", help="write the plan file with calibrated hardware and the figures of the compiler")
    p = _command(subs, "accuracy", accuracy, "Compare predictions with measured settings of other engines.")
    p.add_argument("data", help="table (CSV) of measured settings, of AIConfigurator's form")
    p.add_argument("--engine", choices=engine_names()[1:], default="cuda-graph", help="constants of a step")
    p.add_argument(
        "--no-refit", action="store_true", help="do not fit constants again without each model, chip, engine"
    )
    p.add_argument("--pairs", action="store_true", help="also fit constants without each pair of model and chip")
    p.add_argument(
        "--config",
        action="append",
        metavar="NAME=FILE",
        help="config.json of the model whose model_path is NAME, for a model that no shipped configuration describes",
    )
    p = _command(subs, "buckets", commands.buckets, "Propose buckets that leave fewer rows of a step empty.")
    p.add_argument("counts", help="counts file that a server writes, in the folder steps of its cache")
    p.add_argument("--current", help="buckets to compare with, as 2,0;8,2 (default: those of the last server)")
    p.add_argument("--count", type=int, help="most buckets to propose (default: as many as now)")
    p = _command(
        subs, "export", commands.export, "Write the plan as Kubernetes manifests, environment variables or JSON."
    )
    p.add_argument("plan", help="plan file")
    p.add_argument("--to", choices=FORMATS, required=True, help="format of the output")
    p.add_argument("--image", default="moejax:latest", help="container image (k8s)")
    p.add_argument("--name", default="moejax", help="name of the objects (k8s)")
    p = _command(subs, "report", report, "Write a page on the plan: placement, memory, step, losses, months.")
    p.add_argument("plan", help="plan file")
    p.add_argument("--html", metavar="FILE", required=True, help="page to write, one file without any other")
    p.add_argument("--seed", type=int, default=0, help="random seed of the failures")
    p = _command(subs, "explain", commands.explain, "Explain one rank or one expert in words.")
    p.add_argument("plan", help="plan file")
    p.add_argument("what", nargs="+", help="`rank 3`, `expert 17` or `expert 17 layer 4`")
