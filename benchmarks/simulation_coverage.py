"""The lines and branches of the rooms of the server that seeds of the simulator run, as a table.

python -m benchmarks.simulation_coverage [--seeds 200]        needs the package coverage (pip install coverage)
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOMS = ("serving/recovery", "serving/executor", "serving/engine", "serving/core")
"""The rooms that the simulator is for; of the executor's and the core's modules none is left out."""
HEAD = "| room | lines | branches | modules that run least, with their lines |\n|---|---|---|---|"
LEAST = 3
"""Modules that are named for each room."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run seeds, and print the table. Returns 1 when a seed breaks a law."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulation_coverage", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="number of seeds, both modes in turn")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("coverage") is None:
        sys.exit("the package coverage is not installed: pip install coverage")
    with tempfile.TemporaryDirectory(prefix="moejax-coverage-") as folder:
        data, report = Path(folder, "data"), Path(folder, "report.json")
        coverage = [sys.executable, "-m", "coverage"]
        include = ",".join(f"{room}/*" for room in ROOMS)
        seeds = ["-m", "simulation", "--seeds", str(options.seeds), "--keep-going", "--no-shrink"]
        run = [*coverage, "run", "--branch", f"--include={include}", f"--data-file={data}", *seeds]
        # Another process would not be measured: the hash seed is set before, so that the simulation does not start one.
        code = subprocess.run(run, env={**os.environ, "PYTHONHASHSEED": "0"}, check=False).returncode
        subprocess.run([*coverage, "json", "-q", f"--data-file={data}", "-o", str(report)], check=True)
        print(table(json.loads(report.read_text())["files"]))
    return code


def table(files: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of a report of coverage.py, whose `files` have a `summary` each."""
    rows = [HEAD]
    for room in ROOMS:
        modules = {name: each["summary"] for name, each in files.items() if Path(name).parent == Path(room)}
        if not modules:
            continue
        lines = _share(modules.values(), "covered_lines", "num_statements")
        branches = _share(modules.values(), "covered_branches", "num_branches")
        least = sorted(modules, key=lambda name: _share([modules[name]], "covered_lines", "num_statements"))[:LEAST]
        named = [f"{Path(m).stem} {_share([modules[m]], 'covered_lines', 'num_statements'):.0%}" for m in least]
        rows.append(f"| `{room}` | {lines:.0%} | {branches:.0%} | {', '.join(named)} |")
    return "\n".join(rows)


def _share(summaries: Any, covered: str, of: str) -> float:
    """The share of what is covered; 1 of nothing."""
    every = list(summaries)
    whole = sum(each[of] for each in every)
    return sum(each[covered] for each in every) / whole if whole else 1.0


if __name__ == "__main__":
    sys.exit(main())
