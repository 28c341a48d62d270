"""Measures what speculation gains and costs on real servers: the same requests plain and with drafts, in turn.

    python -m benchmarks.speculation [--model smollm2-moe|tiny] [--ranks 4] [--concurrency 1,8,32] [--text code,prose]
        [--drafts ngram,mtp] [--max-tokens 128] [--rounds 2] [--draft-tokens K] [--json FILE]

A server is started for each way to draft, all before the first request: `ngram`, and with `--drafts ngram,mtp` the
model's own layer too (`tiny` has one). Plain requests go to the first, which is not `mtp`: a server with that layer
pays for it. Three kinds of text: `repeating` (a sentence over and over, greedy), `code` (a file of
Python, and its beginning again, greedy) and `prose` (drawn at temperature 1, so that it repeats nothing). Each round
sends all requests of a kind at once, first plain and then with drafts or the other way round, after their prompts were
put into the prefix caches.
Tokens per second are output tokens from the first request to the last token; `gain` is the median over rounds of the
ratio to plain ones. `tokens_a_step` is the mean of what a request got from a step with drafts. `changed` and `compiles`
must be 0; else it exits with 1. At the end `gains` has a line for each concurrency and kind of text, and a column for
each way to draft.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import inspect
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import command, streams
from benchmarks.launch import launched
from benchmarks.machine import machine
from benchmarks.streams import TEXT, Ask, Trace, play
from benchmarks.throughput import concurrencies
from serving.api.client import AsyncClient
from serving.protocol.status import Status

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


PLAIN = "plain"
"""The name of requests without drafts, beside those of the ways to draft."""


async def measure(
    clients: Mapping[str, AsyncClient], kind: str, concurrency: int, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """The figures of one kind of text at one concurrency, for each way to draft; `clients` are those of its servers,
    the first of which also serves plain requests."""
    asks = asks_of(kind, concurrency, arguments.max_tokens)
    ways = {PLAIN: next(iter(clients.values())), **clients}
    before = {way: await client.status() for way, client in clients.items()}
    for client in clients.values():
        await _play_all(client, [dataclasses.replace(ask, max_tokens=1) for ask in asks])
    rates: dict[str, list[float]] = {way: [] for way in ways}
    tokens: dict[str, list[list[int]]] = {}
    for turn in range(arguments.rounds):
        for way, client in list(ways.items())[:: 1 if turn % 2 == 0 else -1]:
            traces = await _play_all(client, [dataclasses.replace(ask, speculate=way != PLAIN) for ask in asks])
            took = max(trace.times[-1] for trace in traces) - min(trace.sent for trace in traces)
            rates[way].append(sum(len(trace.tokens) for trace in traces) / took)
            tokens[way] = [trace.tokens for trace in traces]
    after = {way: await client.status() for way, client in clients.items()}
    return [
        {
            "text": kind,
            "concurrency": concurrency,
            "way": way,
            "plain_tokens_per_s": round(statistics.median(rates[PLAIN]), 1),
            "tokens_per_s": round(statistics.median(rates[way]), 1),
            "gain": round(statistics.median(b / a for a, b in zip(rates[PLAIN], rates[way], strict=True)), 3),
            **_drafted(before[way], after[way]),
            "changed": sum(a != b for a, b in zip(tokens[PLAIN], tokens[way], strict=True)),
            "compiles": after[way].compiles_after_ready,
        }
        for way in clients
    ]


def _drafted(before: Status, after: Status) -> dict[str, float | None]:
    """The figures of the drafts between two statuses of a server."""
    drafts, drafted = after.drafts - before.drafts, after.drafted - before.drafted
    accepted = after.accepted - before.accepted
    return {
        "tokens_a_step": round(1 + accepted / drafts, 2) if drafts else 1.0,
        "right": round(accepted / drafted, 3) if drafted else None,
    }


async def _play_all(client: AsyncClient, asks: Sequence[Ask]) -> list[Trace]:
    """All requests at once. Raises RuntimeError when one failed."""
    traces = await asyncio.gather(*(play(client, ask) for ask in asks))
    failed = next((trace.error for trace in traces if trace.error is not None), None)
    if failed is not None:
        raise RuntimeError(f"a request failed: {failed}")
    return list(traces)


async def measure_all(addresses: Mapping[str, str], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure each kind at each concurrency on the servers at these addresses, by their way to draft; prints a line for
    each."""
    runs = []
    async with contextlib.AsyncExitStack() as stack:
        clients = {way: await stack.enter_async_context(AsyncClient(address)) for way, address in addresses.items()}
        for concurrency in arguments.concurrency:
            for kind in arguments.text:
                for run in await measure(clients, kind, concurrency, arguments):
                    runs.append(run)
                    print("  ".join(f"{name} {value}" for name, value in run.items()), flush=True)
    return runs


def gains(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of what each way to draft gains over plain requests, with tokens a step in brackets."""
    ways = tuple(dict.fromkeys(run["way"] for run in runs))
    lines = ["requests  text       " + "  ".join(f"{way:>14}" for way in ways)]
    for concurrency, kind in dict.fromkeys((run["concurrency"], run["text"]) for run in runs):
        cells = {run["way"]: run for run in runs if (run["concurrency"], run["text"]) == (concurrency, kind)}
        columns = (f"{cells[way]['gain']:.2f} ({cells[way]['tokens_a_step']:.2f})" for way in ways)
        lines.append(f"{concurrency:8}  {kind:9}  " + "  ".join(f"{column:>14}" for column in columns))
    return lines


def kinds(text: str) -> tuple[str, ...]:
    """Kinds of text from "repeating,code"."""
    names = tuple(text.split(","))
    if set(names) - set(KINDS):
        raise argparse.ArgumentTypeError(f"{text} names a text that is none of {', '.join(KINDS)}")
    return names


def ways(text: str) -> tuple[str, ...]:
    """Ways to draft from "ngram,mtp"; plain requests go to the server of the first."""
    names = tuple(dict.fromkeys(text.split(",")))
    if set(names) - {"ngram", "mtp"}:
        raise argparse.ArgumentTypeError(f"{text} names a way to draft that is none of ngram, mtp")
    if names[0] == "mtp":
        raise argparse.ArgumentTypeError(
            "plain requests go to the first server, and one of mtp pays for its layer; give ngram,mtp"
        )
    return names


def main() -> int:
    """Measure, print, and write JSON. Returns 1 if drafts changed a token or a rank compiled after it was ready."""
    parser = command.parser("benchmarks.speculation", __doc__)
    parser.add_argument("--model", default="smollm2-moe", help="a model's name or folder")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--concurrency", type=concurrencies, default=(1, 8, 32), metavar="1,8,32")
    parser.add_argument("--text", type=kinds, default=KINDS, metavar=",".join(KINDS))
    parser.add_argument("--drafts", type=ways, default=("ngram",), metavar="ngram,mtp", help="ways to draft")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--draft-tokens", type=int, help="--draft-tokens of the server (default: by measurement)")
    parser.add_argument("--json", type=Path, help="file for all results")
    arguments = parser.parse_args()
    fixed = [] if arguments.draft_tokens is None else ["--draft-tokens", str(arguments.draft_tokens)]
    with contextlib.ExitStack() as stack:
        addresses = {}
        for way in arguments.drafts:
            print(f"starting {arguments.model} on {arguments.ranks} ranks, --speculate {way}", flush=True)
            options = ["--speculate", way, *fixed]
            server = stack.enter_context(launched(arguments.model, arguments.ranks, options=options))
            addresses[way] = server.address
        runs = asyncio.run(measure_all(addresses, arguments))
    print("gain over plain (tokens a step)", *gains(runs), sep="\n")
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
