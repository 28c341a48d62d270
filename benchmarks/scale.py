"""Measures step time and recovery time against the number of ranks, and prints the tables of their model.

    python -m benchmarks.scale [--json FILE] [--only fronts|servers] [--ranks 1,2,4,8] [--kills 2] [--note TEXT]
    python -m benchmarks.scale --table FILE [--model deepseek-v3] [--cluster h200]
    python -m benchmarks.scale --fit FILE > configs/front.json

The first command measures the constants of the model (benchmarks/scale_model.py, docs/scale.md) on this machine. A real
front runs steps, rounds of messages and a recovery on 4 to 1024 simulated ranks, which attach over the real protocol
and answer at once: those of the large model through host agents, eight to a host. Then real servers of 1, 2, 4 and 8
ranks give the time of a step with 8 streams, and of recoveries from SIGKILL. With --only, the other half stays as it is
in FILE. The second prints the tables of docs/scale.md from FILE, the third the constants of the front that the planner
takes (planner/cost/front.py).
"""

import argparse
import asyncio
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import command, scale_front, scale_local, scale_tables
from benchmarks.machine import machine
from benchmarks.throughput import concurrencies
from planner.inputs.published import read_model
from serving.protocol.prepared_model import prepare_model
from serving.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
FRONTS = {"deepseek-v3": (8, 16, 64, 256, 320, 1024), "tiny": (4, 16, 64)}
"""Models whose shapes the front's messages have, and the numbers of simulated ranks."""
SERVERS = (("tiny", "float32"), ("bench-mixtral", "int8"))
LOCAL_RANKS = (1, 2, 4, 8)
PER_HOST = {"deepseek-v3": 8, "tiny": 0}
"""Ranks that share the stream of a host agent; 0 for ranks of the front's machine, which have streams of their own."""
PER_RANK, MOST_ROWS = (0.25, 2, 8), 2048
"""Decoding requests for each rank, and the most on all ranks together."""


async def measure_fronts() -> dict[str, Any]:
    """The time that a front spends on steps, rounds and a loss, by model, and on watching idle ranks."""
    tokenizer = Tokenizer.load(ROOT / "models" / "tiny", bos_token=None, stop_tokens=())
    shapes = {name: read_model(source(name)) for name in FRONTS}
    beat = await scale_front.beating(tokenizer, shapes["tiny"], PER_HOST["deepseek-v3"])
    alone = {"beat_ms": 1e3 * beat, "look_ms": 1e3 * await scale_front.looking()}
    print(f"{'watching':14} {scale_front.line(alone)}", flush=True)
    fronts = {
        name: await scale_front.measure(shapes[name], counts, PER_RANK, tokenizer, MOST_ROWS, per_host=PER_HOST[name])
        for name, counts in FRONTS.items()
    }
    return {"fronts": fronts, "standing": alone}


def source(name: str) -> str:
    """The planner's name or file of a model: a file for models of this repository."""
    plain = ROOT / "configs" / "models" / "plain" / f"{name}.json"
    return str(plain) if plain.exists() else name


def measure_servers(runner: asyncio.Runner, counts: Sequence[int], kills: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """For each model: steps and recoveries of real servers, and the model in the planner's numbers."""
    for name, data_type in SERVERS:
        prepared = runner.run(prepare_model(name, data_type))
        rows = scale_local.measure_servers(runner, name, data_type, counts, kills)
        yield name, {"workload": dataclasses.asdict(prepared.workload(32)), "rows": rows}


def main() -> int:
    """Measure and write JSON, or print the tables."""
    arguments = parse()
    if arguments.table is not None:
        print(scale_tables.report(json.loads(arguments.table.read_text()), arguments.model, arguments.cluster))
        return 0
    if arguments.fit is not None:
        print(json.dumps(scale_tables.fitted(json.loads(arguments.fit.read_text())), indent=1))
        return 0
    file, where = arguments.json, machine()
    result = json.loads(file.read_text()) if arguments.only and file is not None and file.exists() else {}

    def save(more: dict[str, Any]) -> None:
        result.update(more)
        if file is not None:
            file.write_text(json.dumps(rounded(result), indent=1) + "\n")

    with asyncio.Runner() as runner:  # gRPC wants one loop for all
        if arguments.only != "servers":
            save(
                {"fronts_machine": where, "per_host": PER_HOST, "fronts_note": arguments.note}
                | runner.run(measure_fronts())
            )
        if arguments.only != "fronts":
            servers: dict[str, Any] = {}
            for name, measured in measure_servers(runner, arguments.ranks, arguments.kills):
                servers[name] = measured
                save({"servers_machine": where, "servers": servers})
    return 0


def rounded(value: Any) -> Any:
    """The values with every number rounded to five decimals."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return round(value, 5) if isinstance(value, float) else value


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command.parser("benchmarks.scale", __doc__)
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    parser.add_argument("--only", choices=("fronts", "servers"), help="measure this half")
    parser.add_argument("--ranks", type=concurrencies, default=LOCAL_RANKS, metavar="1,2,4,8", help="of the servers")
    parser.add_argument("--kills", type=int, default=2, help="recoveries of each server")
    parser.add_argument("--note", default="", help="print this beside the date of the fronts: what was not as usual")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the tables of such a file")
    parser.add_argument("--fit", type=Path, metavar="FILE", help="print the front's constants, from such a file")
    parser.add_argument("--model", default="deepseek-v3", help="of the tables: one of configs/models")
    parser.add_argument("--cluster", default="h200", help="of the tables: one of configs/clusters")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
