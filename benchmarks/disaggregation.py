"""Interference of long prompts with running streams: `python -m benchmarks.disaggregation`.

Streams decode without a pause while long prompts arrive one after the other, on collocated ranks and on the same number
of ranks in two pools (`--arch pd`), in turn, on the same cores. The gaps between two tokens of a stream are measured
without prompts and beside them: 50th and 99th percentile, the longest, and the tokens per second of all streams and of
all prompts. The server and this program share one clock.
"""

import asyncio
import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import parser, write_json
from benchmarks.launch import launched
from benchmarks.machine import machine
from benchmarks.streams import TEXT, Ask, Trace, play, until, whole
from serving.api.client import AsyncClient
from serving.executor.failure_detector import p99

SETTLE_S = 1.0
"""Seconds until all streams decode."""
STREAM_TOKENS = 400
"""Tokens of an answer; the next one of the stream follows at once."""


def gaps_ms(traces: Sequence[Trace], begin: float, end: float) -> list[float]:
    """The gaps between two tokens of an answer that end in a time, in milliseconds."""
    pairs = (pair for trace in traces for pair in itertools.pairwise(trace.times))
    return [1e3 * (after - before) for before, after in pairs if begin <= before and after < end]


def spread(gaps: Sequence[float]) -> dict[str, float]:
    """Percentiles of gaps, in milliseconds."""
    return {"p50": round(statistics.median(gaps), 1), "p99": round(p99(gaps), 1), "max": round(max(gaps), 1)}


async def measure(address: str, streams: int, prompt_tokens: int, seconds: float) -> dict[str, Any]:
    """Streams alone for some seconds, then beside long prompts for as long."""
    async with AsyncClient(address) as client:
        await until(client, whole)
        text = TEXT.read_text()
        sample = await client.generate(text[:1000], max_tokens=1, temperature=0, ignore_eos=True)
        length = 1000 * prompt_tokens // sample.prompt_tokens
        running, going, traces, prompts = True, True, list[Trace](), list[Trace]()

        async def decode(number: int) -> None:
            for turn in itertools.count():
                if not running:
                    return
                begin = 997 * (31 * turn + number) % (len(text) - 200)
                ask = Ask(text[begin : begin + 60], float(number % 2), 1000 * number + turn, STREAM_TOKENS)
                traces.append(Trace(ask, time.monotonic()))
                await play(client, ask, traces[-1])

        async def prefill() -> None:
            for turn in itertools.count():
                if not going:
                    return
                begin = 1009 * turn % (len(text) - length)
                ask = Ask(text[begin : begin + length], 0.0, turn, 1)
                prompts.append(await play(client, ask))

        tasks = [asyncio.create_task(decode(number)) for number in range(streams)]
        await asyncio.sleep(SETTLE_S)
        began = time.monotonic()
        await asyncio.sleep(seconds)
        load, beside = asyncio.create_task(prefill()), time.monotonic()
        await asyncio.sleep(seconds)
        going, ended = False, time.monotonic()
        running = False
        await asyncio.gather(load, *tasks)
        status = await client.status()
    done = [trace for trace in prompts if trace.times and trace.times[0] < ended]
    tokens = [sum(a <= at < b for t in traces for at in t.times) for a, b in ((began, beside), (beside, ended))]
    return {
        "alone": spread(gaps_ms(traces, began, beside)),
        "beside prompts": spread(gaps_ms(traces, beside, ended)),
        "tokens/s alone": round(tokens[0] / (beside - began), 1),
        "tokens/s beside prompts": round(tokens[1] / (ended - beside), 1),
        "prompt tokens/s": round(sum(trace.prompt_tokens for trace in done) / (ended - beside), 1),
        "time to first token, ms": round(statistics.median(1e3 * (t.times[0] - t.sent) for t in done), 1)
        if done
        else None,
        "failed": sum(trace.error is not None for trace in (*traces, *prompts)),
        "compiles": status.compiles_after_ready,
    }


def main() -> None:
    """Print the figures, and how much smaller the 99th percentile of gaps beside prompts is with two pools."""
    options = parser("benchmarks.disaggregation", __doc__)
    options.add_argument("--model", default="smollm2-moe")
    options.add_argument("--prefill", type=int, default=1, help="ranks for prompts")
    options.add_argument("--decode", type=int, default=1, help="ranks that decode")
    options.add_argument("--streams", type=int, default=4)
    options.add_argument("--prompt-tokens", type=int, default=1800, help="about")
    options.add_argument("--seconds", type=float, default=20.0, help="of each half")
    options.add_argument("--rounds", type=int, default=1)
    options.add_argument("--json", type=Path, help="write the figures to this file")
    given = options.parse_args()
    ranks = given.prefill + given.decode
    apart = ("--arch", "pd", "--prefill", str(given.prefill), "--decode", str(given.decode))
    rounds: list[dict[str, Any]] = []
    for _ in range(given.rounds):
        for arch, flags in (("collocated", ()), ("pd", apart)):
            with launched(given.model, ranks, options=("--no-prefix-caching", *flags)) as server:
                figures = asyncio.run(measure(server.address, given.streams, given.prompt_tokens, given.seconds))
            rounds.append({"arch": arch, **figures})
            print(f"{arch}: {figures}", flush=True)
    worst = {
        arch: statistics.median(each["beside prompts"]["p99"] for each in rounds if each["arch"] == arch)
        for arch in ("collocated", "pd")
    }
    ratio = round(worst["collocated"] / worst["pd"], 1)
    print(
        f"p99 of gaps beside prompts: {worst['collocated']} ms collocated, {worst['pd']} ms in two pools: {ratio} times"
    )
    write_json(
        given.json, {"machine": machine(), "model": given.model, "ranks": ranks, "rounds": rounds, "ratio": ratio}
    )


if __name__ == "__main__":
    main()
