"""Measures what clients of an OpenAI server see when one of its processes is killed or frozen.

    python -m benchmarks.chaos --target moejax|vllm|llama.cpp|URL [--fault rank:SIGKILL ...] [--clients 8] [--json FILE]
        [-- OPTIONS OF THE SERVER]

Clients are plain `openai` clients, each with one stream of /v1/completions at a time at temperature 0. Every request is
sent twice undisturbed; then the clients send them again and again, and one fault after the other hits the process that
its selector names (moejax: rank, rank:N, front, coordinator; vllm and llama.cpp: server, worker; a URL: a process id or
text of a command line). Moments are drawn from --seed. The next fault comes when the server is whole again and text
arrives at its usual rate. docs/chaos.md says what the figures mean and how to add a server.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks.chaos.compare import Difference
from benchmarks.chaos.result import VERSION, Fault, Result, differences, fault, tokens_a_character, totals
from benchmarks.chaos.streams import Asking, Crowd, undisturbed
from benchmarks.chaos.targets import TARGETS, Target, Url
from benchmarks.machine import machine
from benchmarks.streams import TEXT

SIGNALS = ("SIGKILL", "SIGSTOP", "SIGTERM", "SIGSEGV")
_SETTLE_S = 4.0
"""Load before the first fault, and after the server is whole, by which the usual rate is known."""
_BACK_S = 6.0
"""Seconds of observation after the server is whole again."""
_POLL_S = 0.2
_GRACE_S = 30.0
"""Seconds for the last streams to end."""


def make_prompts(count: int, characters: int) -> list[str]:
    """Prompts from different parts of one text."""
    text = TEXT.read_text()
    step = max(1, (len(text) - characters) // count)
    return [text[i * step : i * step + characters] for i in range(count)]


async def injected(
    target: Target, spec: str, crowd: Crowd, draw: random.Random, limit_s: float
) -> tuple[float, float, int]:
    """One fault: its moment, when its observation ended, and the restarts that it caused.

    The observation ends without a recovery when the server is not whole, or sends nothing, within the limit.
    """
    selector, _, how = spec.rpartition(":")
    await asyncio.sleep(_SETTLE_S + draw.uniform(0.0, 1.0))
    before = target.restarts
    pid = await asyncio.to_thread(target.process, selector)
    moment = time.monotonic()
    os.kill(pid, signal.Signals[how])
    await asyncio.sleep(_POLL_S)
    while not (
        await asyncio.to_thread(target.whole) and crowd.delivered(max(moment + _POLL_S, time.monotonic() - 1.0))
    ):
        if time.monotonic() - moment > limit_s:
            return moment, time.monotonic(), target.restarts - before
        await asyncio.sleep(_POLL_S)
    await asyncio.sleep(_BACK_S)
    return moment, time.monotonic(), target.restarts - before


async def run(target: Target, options: argparse.Namespace) -> Result:
    """The whole trial of a running server."""
    where = machine()
    prompts = make_prompts(options.prompts, options.prompt_characters)
    asking = Asking(target.model, options.max_tokens, {**target.extra_body, **options.extra_body})
    print("sending every request twice, undisturbed", flush=True)
    first = await undisturbed(target.url, asking, prompts, options.clients)
    second = await undisturbed(target.url, asking, prompts, options.clients)
    wanted = {stream.prompt: stream.text for stream in first}
    rate = tokens_a_character(first)
    by_itself = sum(difference != Difference() for difference in differences(second, wanted))
    usual = sum(s.tokens or 0 for s in second) / (max(s.times[-1] for s in second) - min(s.sent for s in second))
    pieces = sum(len(s.times) for s in first)
    draw, crowd, began = random.Random(options.seed), Crowd(target.url, asking, prompts), time.monotonic()
    crowd.start(options.clients)
    observed: list[tuple[str, float, float, int]] = []
    try:
        for spec in options.fault:
            observed.append((spec, *await injected(target, spec, crowd, draw, options.limit_s)))
            print(f"{spec} at {observed[-1][1] - began:.1f} s", flush=True)
    finally:
        streams = await crowd.stop(_GRACE_S)
    since = [began, *(end - _SETTLE_S / 2 for _, _, end, _ in observed)]
    faults = [
        fault(
            streams,
            selector=spec.rpartition(":")[0],
            signal=spec.rpartition(":")[2],
            moment=moment,
            began=began,
            usual_since=max(since[i], moment - _SETTLE_S),
            end=end,
            restarts=restarts,
            tokens_a_piece=sum(s.tokens or 0 for s in first) / pieces,
        )
        for i, (spec, moment, end, restarts) in enumerate(observed)
    ]
    return Result(
        version=VERSION,
        target=target.about,
        model=target.model,
        setup=target.setup,
        machine=where,
        clients=options.clients,
        answer_tokens=round(sum(s.tokens or 0 for s in first) / len(first), 1),
        usual_rate=round(usual, 1),
        faults=faults,
        totals=totals(streams, wanted, rate, by_itself=by_itself, restarts=target.restarts),
    )


def shown(result: Result) -> str:
    """The result as text."""
    lines = [
        f"{result.target}, {result.model}: {result.setup}",
        f"{result.clients} clients, {result.answer_tokens:.0f} tokens an answer, {result.usual_rate} tokens/s",
        "",
        f"{'fault':22} {'open':>4} {'lost':>4} {'longest wait s':>14} {'95 % after s':>12} {'not sent':>8} restarts",
    ]
    lines += [row(fault) for fault in result.faults]
    lines.append("")
    lines += [f"{name.replace('_', ' '):30} {value}" for name, value in msgspec.structs.asdict(result.totals).items()]
    return "\n".join(lines)


def row(fault: Fault) -> str:
    """A fault as a row of the table."""

    def optional(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    return (
        f"{fault.selector + ' ' + fault.signal:22} {fault.open_streams:4} {fault.streams_lost:4} "
        f"{optional(fault.longest_wait_s, 2):>14} {optional(fault.back_s, 1):>12} "
        f"{optional(fault.tokens_not_sent, 0):>8} {fault.restarts:8}"
    )


def fault_spec(text: str) -> str:
    """SELECTOR:SIGNAL, checked."""
    selector, _, how = text.rpartition(":")
    if not selector or how not in SIGNALS:
        raise argparse.ArgumentTypeError(f"{text} is not SELECTOR:SIGNAL with one of {', '.join(SIGNALS)}")
    return text


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; what follows `--` are options of the server."""
    about, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos",
        description=about,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", default="moejax", help=f"{', '.join(TARGETS)}, or the address of a running server")
    parser.add_argument("--fault", type=fault_spec, nargs="+", metavar="SELECTOR:SIGNAL", help="default: by target")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=24, help="different requests")
    parser.add_argument("--prompt-characters", type=int, default=400)
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--extra-body", type=json.loads, default={}, help="JSON object: further fields of requests")
    parser.add_argument("--limit-s", type=float, default=300.0, help="seconds within which a server must recover")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the faults")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of a result, and end")
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:at])
    options.server = list(arguments[at + 1 :])
    if options.fault is None:
        process = "rank" if options.target == "moejax" else "worker"
        if options.target not in TARGETS and not options.schema:
            parser.error(f"--target {options.target} is a running server: give --fault PROCESS_ID:SIGKILL")
        options.fault = [f"{process}:SIGKILL", f"{process}:SIGSTOP"]
    return options


def main() -> int:
    """Run, print, and write JSON."""
    options = parse(sys.argv[1:])
    if options.schema:
        print(json.dumps(msgspec.json.schema(Result), indent=1))
        return 0
    kind = TARGETS.get(options.target)
    with kind.start(options.server) if kind else Url.start([options.target]) as target:
        result = asyncio.run(run(target, options))
    print(shown(result))
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
