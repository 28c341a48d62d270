"""Compares moejax with llama.cpp on this machine: the same weights and prompts, one client, in turn.

    python -m benchmarks.peers --llama-cpp ENVIRONMENT/bin/python [--model bench-mixtral] [--data-type int8 int4]
        [--form Q8_0 Q4_0] [--rounds 2] [--json FILE]

ENVIRONMENT is one of its own with `pip install xllamacpp`, whose HTTP server is measured as it comes, with one slot
for each stream and a thread for each core. It gets the model as GGUF in each form of `--form`. In each round every
server is started, warmed, measured at each concurrency and stopped, so that all share the hours of the machine. The
client is the asynchronous HTTP client of `benchmarks.throughput`; requests are greedy, with prompts of 64 characters
(each a token of a yardstick), never repeated to one server. Tokens/s are output tokens from the first request to the
last token; figures are medians over rounds.
"""

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks import command
from benchmarks.gguf_model import TYPES, write_gguf
from benchmarks.http_streams import http_client, play_http
from benchmarks.launch import launched
from benchmarks.machine import machine
from benchmarks.streams import TEXT, Ask, Trace
from benchmarks.throughput import closed_loop, concurrencies, summarize
from moejax.tools.resolve import ensure_model
from serving.config import DATA_TYPES

SERVER = """
import os, sys, xllamacpp
model, slots, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
params = xllamacpp.CommonParams()
params.model.path = model
params.n_parallel, params.n_ctx = slots, slots * context
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
params.warmup = True
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""
CONTEXT = 512
"""Tokens of a slot of llama.cpp."""


@contextlib.contextmanager
def llama_cpp(python: Path, model: Path, slots: int) -> Iterator[str]:
    """Run llama.cpp's server on a GGUF file; yields its host:port."""
    process = subprocess.Popen(
        [str(python), "-c", SERVER, str(model), str(slots), str(CONTEXT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip().removeprefix("http://")
        if not address:
            raise RuntimeError(f"{python} did not start llama.cpp's server; is xllamacpp installed there?")
        yield address
    finally:
        process.stdin.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def play_llama(client: httpx.AsyncClient, ask: Ask) -> Trace:
    """Send a request to llama.cpp's /completion and read its stream to the end, each on a connection of its own, as
    the server closes idle ones."""
    trace = Trace(ask, time.monotonic())
    body = {
        "prompt": ask.prompt,
        "temperature": ask.temperature,
        "n_predict": ask.max_tokens,
        "ignore_eos": True,
        "cache_prompt": False,
        "stream": True,
    }
    async with client.stream("POST", "/completion", json=body, headers={"Connection": "close"}) as answer:
        if answer.status_code != 200:
            trace.error = (await answer.aread()).decode()
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or trace.error is not None:
                continue
            now, event = time.monotonic(), json.loads(line.removeprefix("data: "))
            if "error" in event:
                trace.error = event["error"]["message"]
                continue
            new = event["tokens_predicted"] - len(trace.times)
            trace.times += [now] * new
            trace.tokens += [-1] * new
    if trace.error is None and len(trace.tokens) != ask.max_tokens:
        trace.error = f"{len(trace.tokens)} tokens of {ask.max_tokens}"
    return trace


def asks_of(count: int, characters: int, max_tokens: int, seed: int) -> list[Ask]:
    """Greedy requests, each with another part of the text; of a yardstick a character is a token."""
    text = TEXT.read_text()
    step = (len(text) - characters) // (count + 1)
    starts = (i * step + seed for i in range(count))
    return [Ask(text[start : start + characters], 0.0, i, max_tokens) for i, start in enumerate(starts)]


async def measure(address: str, play: Any, options: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """The figures at each concurrency, after requests that are not counted."""
    counts = [(2 if concurrency > 1 else 4) * concurrency for concurrency in options.concurrency]
    warming = options.concurrency
    asks = iter(asks_of(sum(counts) + sum(warming), options.prompt_characters, options.max_tokens, seed))
    runs = []
    async with http_client(address, max(options.concurrency)) as client:
        play_one = functools.partial(play, client)
        for concurrency, count, warm in zip(options.concurrency, counts, warming, strict=True):
            await closed_loop(play_one, list(itertools.islice(asks, warm)), concurrency, warm)
            traces = await closed_loop(play_one, list(itertools.islice(asks, count)), concurrency, count)
            runs.append(summarize(traces, concurrency))
    return runs


def measure_round(options: argparse.Namespace, files: dict[str, Path], seed: int) -> dict[str, list[dict[str, Any]]]:
    """Each server once: figures by its name."""
    found = {}
    for data_type in options.data_type:
        with launched(options.model, 1, options=["--data-type", data_type]) as server:
            found[f"moejax {data_type}"] = asyncio.run(measure(server.http, play_http, options, seed))
        _print(f"moejax {data_type}", found)
    for form, file in files.items():
        with llama_cpp(options.llama_cpp, file, max(options.concurrency)) as address:
            found[f"llama.cpp {form}"] = asyncio.run(measure(address, play_llama, options, seed))
        _print(f"llama.cpp {form}", found)
    return found


def _print(name: str, found: dict[str, list[dict[str, Any]]]) -> None:
    rates = " / ".join(f"{run['output_tokens_per_s']:,.0f}" for run in found[name])
    print(f"{name}: {rates} tokens/s, TTFT {' / '.join(str(run['ttft_ms']) for run in found[name])} ms", flush=True)


def table(rounds: Sequence[dict[str, list[dict[str, Any]]]]) -> list[str]:
    """Rows in Markdown: medians over rounds of each server, by concurrency."""
    rows = ["| | tokens/s | TTFT, ms |", "|---|---|---|"]
    for name in rounds[0]:
        runs = list(zip(*(each[name] for each in rounds), strict=True))
        rates = [statistics.median(run["output_tokens_per_s"] for run in same) for same in runs]
        waits = [statistics.median(run["ttft_ms"] for run in same) for same in runs]
        cells = " / ".join(f"{rate:,.0f}" for rate in rates), " / ".join(f"{wait:,.0f}" for wait in waits)
        rows.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return rows


def main() -> int:
    """Measure, print, and write JSON."""
    options = parse()
    folder = ensure_model(options.model)
    rounds = []
    with tempfile.TemporaryDirectory(prefix="moejax-peers-") as place:
        files = {form: Path(place) / f"{form}.gguf" for form in options.form}
        for form, file in files.items():
            write_gguf(folder, file, form)
        for seed in range(options.rounds):
            rounds.append(measure_round(options, files, seed))
    print("\n".join(table(rounds)))
    if options.json is not None:
        about = {"machine": machine(), "model": options.model, "threads": len(os.sched_getaffinity(0))}
        command.write_json(options.json, about | {"rounds": rounds})
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command.parser("benchmarks.peers", __doc__)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="Python of an environment with xllamacpp")
    parser.add_argument("--model", default="bench-mixtral", help="a model's name or folder")
    parser.add_argument("--data-type", nargs="*", choices=DATA_TYPES, default=["bfloat16", "int8", "int4"])
    parser.add_argument("--form", nargs="*", choices=list(TYPES), default=list(TYPES), help="of GGUF")
    parser.add_argument("--concurrency", type=concurrencies, default=(1, 8, 32), metavar="1,8,32")
    parser.add_argument("--prompt-characters", type=int, default=64, help="of a yardstick each is a token")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for all results")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
