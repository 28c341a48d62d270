"""Measures what speculation gains and costs on a real server: the same requests plain and with drafts, in turn.

    python -m benchmarks.speculation [--model smollm2-moe|tiny] [--ranks 4] [--concurrency 1,8,32] [--text code,prose]
        [--max-tokens 128] [--rounds 2] [--draft-tokens K] [--json FILE]

Three kinds of text: `repeating` (a sentence over and over, greedy), `code` (a file of Python, and its beginning
again, greedy) and `prose` (drawn at temperature 1, so that it repeats nothing). Each round sends all requests of a kind
at once, first plain and then with drafts or the other way round, after their prompts were put into the prefix cache.
Tokens per second are output tokens from the first request to the last token; `gain` is the median over rounds of the
ratio of the two. `tokens_a_step` is the mean of what a request got from a step with drafts. `changed` and `compiles`
must be 0; else it exits with 1.
"""

import argparse
import asyncio
import dataclasses
import inspect
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import command, streams
from benchmarks.launch import launched
from benchmarks.machine import machine
from benchmarks.streams import TEXT, Ask, Trace, play
from benchmarks.throughput import concurrencies
from serving.api.client import AsyncClient

KINDS = ("repeating", "code", "prose")
PROMPT_CHARACTERS = 600
_WORDS = ("red", "blue", "green", "one", "two", "three", "sun", "moon", "star", "cat", "dog", "bird", "tea", "milk")


def asks_of(kind: str, count: int, max_tokens: int) -> list[Ask]:
    """Requests of a kind of text, each with a prompt of its own."""
    if kind == "repeating":
        phrases = (f"{_WORDS[n % 14]}, {_WORDS[n * 3 % 14]} and {_WORDS[n * 5 % 14]}. " for n in range(1, count + 1))
        prompts = (f"Number {n}: " + each * (PROMPT_CHARACTERS // len(each)) for n, each in enumerate(phrases))
        return [Ask(prompt, 0.0, 0, max_tokens) for prompt in prompts]
    if kind == "code":
        source = inspect.getsource(streams)
        parts = (source[n * 150 % (len(source) - PROMPT_CHARACTERS) :][:PROMPT_CHARACTERS] for n in range(count))
        return [Ask(f"{part}\n\n# The same again:\n{part[:100]}", 0.0, 0, max_tokens) for part in parts]
    text = TEXT.read_text()
    starts = (n * 167 % (len(text) - PROMPT_CHARACTERS) for n in range(count))
    return [Ask(text[start : start + PROMPT_CHARACTERS], 1.0, n, max_tokens) for n, start in enumerate(starts)]


async def measure(client: AsyncClient, kind: str, concurrency: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of one kind of text at one concurrency."""
    asks = asks_of(kind, concurrency, arguments.max_tokens)
    await _play_all(client, [dataclasses.replace(ask, max_tokens=1) for ask in asks])
    rates: dict[bool, list[float]] = {False: [], True: []}
    tokens: dict[bool, list[list[int]]] = {}
    before = await client.status()
    for turn in range(arguments.rounds):
        for speculate in (False, True) if turn % 2 == 0 else (True, False):
            traces = await _play_all(client, [dataclasses.replace(ask, speculate=speculate) for ask in asks])
            took = max(trace.times[-1] for trace in traces) - min(trace.sent for trace in traces)
            rates[speculate].append(sum(len(trace.tokens) for trace in traces) / took)
            tokens[speculate] = [trace.tokens for trace in traces]
    after = await client.status()
    drafts, drafted = after.drafts - before.drafts, after.drafted - before.drafted
    accepted = after.accepted - before.accepted
    return {
        "text": kind,
        "concurrency": concurrency,
        "plain_tokens_per_s": round(statistics.median(rates[False]), 1),
        "tokens_per_s": round(statistics.median(rates[True]), 1),
        "gain": round(statistics.median(b / a for a, b in zip(rates[False], rates[True], strict=True)), 3),
        "tokens_a_step": round(1 + accepted / drafts, 2) if drafts else 1.0,
        "right": round(accepted / drafted, 3) if drafted else None,
        "changed": sum(a != b for a, b in zip(tokens[False], tokens[True], strict=True)),
        "compiles": after.compiles_after_ready,
    }


async def _play_all(client: AsyncClient, asks: Sequence[Ask]) -> list[Trace]:
    """All requests at once. Raises RuntimeError when one failed."""
    traces = await asyncio.gather(*(play(client, ask) for ask in asks))
    failed = next((trace.error for trace in traces if trace.error is not None), None)
    if failed is not None:
        raise RuntimeError(f"a request failed: {failed}")
    return list(traces)


async def measure_all(address: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure each kind at each concurrency; prints a line for each."""
    runs = []
    async with AsyncClient(address) as client:
        for concurrency in arguments.concurrency:
            for kind in arguments.text:
                runs.append(await measure(client, kind, concurrency, arguments))
                print("  ".join(f"{name} {value}" for name, value in runs[-1].items()), flush=True)
    return runs


def kinds(text: str) -> tuple[str, ...]:
    """Kinds of text from "repeating,code"."""
    names = tuple(text.split(","))
    if set(names) - set(KINDS):
        raise argparse.ArgumentTypeError(f"{text} names a text that is none of {', '.join(KINDS)}")
    return names


def main() -> int:
    """Measure, print, and write JSON. Returns 1 if drafts changed a token or a rank compiled after it was ready."""
    parser = command.parser("benchmarks.speculation", __doc__)
    parser.add_argument("--model", default="smollm2-moe", help="a model's name or folder")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--concurrency", type=concurrencies, default=(1, 8, 32), metavar="1,8,32")
    parser.add_argument("--text", type=kinds, default=KINDS, metavar=",".join(KINDS))
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--draft-tokens", type=int, help="--draft-tokens of the server (default: by measurement)")
    parser.add_argument("--json", type=Path, help="file for all results")
    arguments = parser.parse_args()
    print(f"starting {arguments.model} on {arguments.ranks} ranks", flush=True)
    options = ["--speculate", "ngram"]
    if arguments.draft_tokens is not None:
        options += ["--draft-tokens", str(arguments.draft_tokens)]
    with launched(arguments.model, arguments.ranks, options=options) as server:
        runs = asyncio.run(measure_all(server.address, arguments))
    command.write_json(
        arguments.json,
        {
            "machine": machine(),
            "model": arguments.model,
            "ranks": arguments.ranks,
            "output_tokens": arguments.max_tokens,
            "draft_tokens": arguments.draft_tokens,
            "runs": runs,
        },
    )
    return int(any(run["changed"] or run["compiles"] for run in runs))


if __name__ == "__main__":
    raise SystemExit(main())
