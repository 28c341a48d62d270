"""python -m simulation --seeds 1000: run scenarios, and print the first that breaks a law, made small."""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from simulation.figures import Figures, Record, code_digest, parts, total
from simulation.run import Outcome, run
from simulation.scenario import Mode, draw
from simulation.shrink import shrink

TRACE_LINES = 200
CHUNK = 16
"""Seeds that a process of `--jobs` takes at a time."""
PART = 1000
"""Seeds of a part of the record."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the scenarios of a range of seeds. Returns 1 when a law was broken."""
    parser = argparse.ArgumentParser(prog="python -m simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="number of seeds")
    parser.add_argument("--seed", type=int, default=None, help="run this seed alone, and print its trace")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--mode", choices=("safety", "liveness", "both"), default="both", help="default: both in turn")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes")
    parser.add_argument("--json", type=Path, help="write the figures and the failing seeds to this file")
    parser.add_argument(
        "--record",
        type=Path,
        help=f"append a line to this file for every {PART} seeds that have run, and do not run those again that are in "
        "it, with this code: a long run can be stopped and goes on",
    )
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first seed that breaks a law")
    parser.add_argument("--no-shrink", action="store_true", help="do not make failing scenarios smaller")
    options = parser.parse_args(arguments)
    if os.environ.get("PYTHONHASHSEED") != "0" and arguments is None:  # the order of sets of names is the seed's, too
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "simulation", *sys.argv[1:]])
    modes: tuple[Mode, ...] = ("safety", "liveness") if options.mode == "both" else (options.mode,)
    if options.seed is not None:
        return max(_replay(options.seed, mode, shrinks=not options.no_shrink) for mode in modes)
    return _run_all(options, modes)


def _outcomes(
    wanted: Sequence[tuple[int, Mode]], pool: concurrent.futures.ProcessPoolExecutor | None
) -> Iterator[Outcome]:
    """The outcomes of these seeds, in order."""
    return map(_outcome, wanted) if pool is None else pool.map(_outcome, wanted, chunksize=CHUNK)


def _outcome(wanted: tuple[int, Mode]) -> Outcome:
    """The outcome of one seed; with its trace only when it breaks a law."""
    outcome = run(draw(*wanted))
    return outcome if outcome.violations else dataclasses.replace(outcome, trace=())


def _run_all(options: argparse.Namespace, modes: tuple[Mode, ...]) -> int:
    record = Record(options.record, modes, code_digest(Path(__file__).parents[1]))
    done: list[Figures] = []
    with contextlib.ExitStack() as stack:
        pool = None
        if options.jobs > 1:
            pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(options.jobs))
            stack.callback(pool.shutdown, cancel_futures=True)
        for first, number in parts(options.first, options.seeds, PART):
            figures = record.figures_of(first, number)
            if figures is None:
                wanted: list[tuple[int, Mode]] = [
                    (seed, modes[seed % len(modes)]) for seed in range(first, first + number)
                ]
                figures = _run_part(options, wanted, pool)
                if figures.seeds == number:
                    record.add(first, number, figures)
                if options.record is not None:
                    print(f"seeds {first} to {first + figures.seeds - 1}: {figures.line()}", flush=True)
            else:
                for failing in figures.failing:
                    _print_recorded(failing)
            done.append(figures)
            if figures.failing and not options.keep_going:
                break
    figures = total(done)
    print(figures.line())
    if options.json is not None:
        options.json.write_text(json.dumps({"first": options.first, "modes": modes, **figures.json()}, indent=2) + "\n")
    return 1 if figures.failing else 0


def _run_part(
    options: argparse.Namespace,
    wanted: Sequence[tuple[int, Mode]],
    pool: concurrent.futures.ProcessPoolExecutor | None,
) -> Figures:
    """Run these seeds, to the first that breaks a law unless others are wanted."""
    figures, began = Figures(), time.perf_counter()
    for outcome in _outcomes(wanted, pool):
        figures.add(outcome)
        if outcome.violations:
            _print_failure(outcome, shrinks=not options.no_shrink)
            if not options.keep_going:
                break
    figures.seconds = time.perf_counter() - began
    return figures


def _replay(seed: int, mode: Mode, *, shrinks: bool) -> int:
    outcome = run(draw(seed, mode))
    if outcome.violations:
        _print_failure(outcome, shrinks=shrinks)
        return 1
    print("\n".join([*outcome.scenario.lines(), *outcome.trace, "no law is broken"]))
    return 0


def _print_failure(outcome: Outcome, *, shrinks: bool) -> None:
    """Print a failing scenario, as small as it could be made."""
    scenario, law = outcome.scenario, outcome.violations[0]
    print(f"seed {scenario.seed} ({scenario.mode}) breaks a law: {law}")
    if shrinks:
        small = shrink(scenario, lambda candidate: bool(run(candidate).violations))
        outcome = run(small)
        print(f"made smaller: {len(small.faults)} of {len(scenario.faults)} faults, {len(small.clients)} clients")
    print("\n".join(outcome.scenario.lines()))
    for fault in outcome.scenario.faults:
        print(f"  {fault}")
    for client in outcome.scenario.clients:
        given = {name: value for name, value in dataclasses.asdict(client).items() if value not in (None, (), 1)}
        print(f"  client {given}")
    until = next((i for i, line in enumerate(outcome.trace) if "VIOLATED" in line), len(outcome.trace))
    print("\n".join(outcome.trace[max(0, until - TRACE_LINES) : until + 10]))
    for violation in outcome.violations:
        print(f"broken: {violation}")
    print(_again(scenario.seed, scenario.mode))


def _print_recorded(failing: Mapping[str, Any]) -> None:
    """Print a failing seed of a part that has run before."""
    seed, mode = failing["seed"], failing["mode"]
    print(f"seed {seed} ({mode}) breaks a law: {failing['violations'][0]}\n{_again(seed, mode)}")


def _again(seed: int, mode: str) -> str:
    """The line that says how a seed is run once more."""
    return f"again: python -m simulation --seed {seed} --mode {mode}"


if __name__ == "__main__":
    sys.exit(main())
