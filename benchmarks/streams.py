"""Requests with known outputs, streams that record when each token came, and closed-loop load made of them."""

import asyncio
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from serving.api.client import AsyncClient
from serving.errors import MoejaxError, Unreachable
from serving.protocol.status import Status

TEXT = Path(__file__).resolve().parent.parent / "models" / "tiny" / "held_out" / "shakespeare.txt"
PLACE_LOOKS, PLACE_LOOK_S = 20, 0.01
_AFTER_ERROR_S = 0.5  # pause before the next request, so that a server that refuses is not flooded


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request. The same prompt and seed give the same output, whatever happens to the ranks."""

    prompt: str
    temperature: float
    seed: int
    max_tokens: int
    speculate: bool | None = None


@dataclasses.dataclass
class Trace:
    """One stream as its client saw it. `times[i]` is when `tokens[i]` came, in seconds of the monotonic clock."""

    ask: Ask
    sent: float
    rank: int | None = None
    """The rank that served it first, if known."""
    prompt_tokens: int = 0
    times: list[float] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    error: str | None = None
    unreachable: bool = False
    """True if no server could be reached."""
    begun: asyncio.Event = dataclasses.field(default_factory=asyncio.Event, repr=False)


async def play(client: AsyncClient, ask: Ask, trace: Trace | None = None) -> Trace:
    """Send a request and read its stream to the end. An error is recorded in the trace."""
    trace = trace or Trace(ask, time.monotonic())
    stream = client.stream(
        ask.prompt,
        temperature=ask.temperature,
        seed=ask.seed,
        max_tokens=ask.max_tokens,
        speculate=ask.speculate,
        ignore_eos=True,
    )
    try:
        async for chunk in stream:
            trace.times += [time.monotonic()] * len(chunk.token_ids)
            trace.tokens += chunk.token_ids
            trace.begun.set()
        trace.prompt_tokens = stream.complete.prompt_tokens if stream.complete else 0
    except MoejaxError as error:
        trace.error = f"{type(error).__name__}: {error}"
        trace.unreachable = isinstance(error, Unreachable) and not trace.tokens
    finally:
        trace.begun.set()
    return trace


@dataclasses.dataclass
class Known:
    """Requests with the tokens that they get undisturbed."""

    traces: list[Trace]

    @classmethod
    async def record(cls, client: AsyncClient, count: int, prompt_tokens: int, max_tokens: int) -> Self:
        """Send `count` requests at once, alternately greedy and seeded. Other requests change no token of a request."""
        asks = await make_asks(client, count, prompt_tokens, max_tokens)
        traces = await asyncio.gather(*(play(client, ask) for ask in asks))
        for trace in traces:
            if trace.error is not None:
                raise RuntimeError(f"an undisturbed request failed: {trace.error}")
        return cls(list(traces))

    @property
    def asks(self) -> list[Ask]:
        """The requests."""
        return [trace.ask for trace in self.traces]

    def prompt_tokens(self, ask: Ask) -> int:
        """Number of tokens of a request's prompt."""
        return next(trace.prompt_tokens for trace in self.traces if trace.ask == ask)

    def failed(self, traces: Sequence[Trace]) -> int:
        """The number of streams that ended in an error."""
        return sum(trace.error is not None for trace in traces)

    def changed(self, traces: Sequence[Trace]) -> int:
        """The number of streams whose tokens differ from the known ones; of a failed stream the received tokens
        count."""
        right = {trace.ask: trace.tokens for trace in self.traces}

        def wanted(trace: Trace) -> list[int]:
            whole = right[trace.ask]
            return whole if trace.error is None else whole[: len(trace.tokens)]

        return sum(trace.tokens != wanted(trace) for trace in traces)


async def make_asks(client: AsyncClient, count: int, prompt_tokens: int, max_tokens: int) -> list[Ask]:
    """Requests with prompts of about `prompt_tokens` tokens, each from another part of the text."""
    text = TEXT.read_text()
    sample = await client.generate(text[:1000], max_tokens=1, temperature=0, ignore_eos=True)
    length = 1000 * prompt_tokens // sample.prompt_tokens
    step = max(1, (len(text) - length) // count)
    return [Ask(text[i * step : i * step + length], float(i % 2), i, max_tokens) for i in range(count)]


class Load:
    """Streams in closed loops: each sends its next request when the previous one has ended, until `stop`."""

    def __init__(self, client: AsyncClient, asks: Sequence[Ask]) -> None:
        self._client = client
        self._turn = itertools.cycle(asks)
        self._going = True
        self._loops: list[asyncio.Task[None]] = []
        self.traces: list[Trace] = []

    def start(self, streams: int) -> None:
        """Start this many loops."""
        self._loops += [asyncio.create_task(self._loop(next(self._turn))) for _ in range(streams)]

    async def place(self, asks: Sequence[Ask]) -> list[Trace]:
        """Start a loop for each request, one by one, and record the rank whose number of streams grew by it."""
        placed = []
        for ask in asks:
            before = running(await self._client.status())
            trace = Trace(ask, time.monotonic())
            self._loops.append(asyncio.create_task(self._loop(ask, trace)))
            await trace.begun.wait()
            for _ in range(PLACE_LOOKS):  # with arch pd it goes to its decode rank after its first token
                after = running(await self._client.status())
                grown = [rank for rank, count in after.items() if count > before.get(rank, 0)]
                if grown:
                    break
                await asyncio.sleep(PLACE_LOOK_S)
            trace.rank = grown[0] if len(grown) == 1 else None
            placed.append(trace)
        return placed

    async def stop(self) -> list[Trace]:
        """Send no more requests, wait for the running ones, and return the traces of all."""
        self._going = False
        await asyncio.gather(*self._loops)
        return self.traces

    async def _loop(self, ask: Ask, trace: Trace | None = None) -> None:
        while True:
            trace = trace or Trace(ask, time.monotonic())
            self.traces.append(trace)
            await play(self._client, ask, trace)
            if not self._going:
                return
            if trace.error is not None:
                await asyncio.sleep(_AFTER_ERROR_S)
            if trace.unreachable:  # no server received the request: send another
                self.traces.remove(trace)
                trace = None
                continue
            ask, trace = next(self._turn), None


def running(status: Status) -> dict[int, int]:
    """The number of streams on each serving rank that decodes."""
    return {rank.id: rank.running for rank in status.ranks if rank.state == "serving" and rank.role != "prefill"}


def whole(status: Status) -> bool:
    """True if all ranks serve and every loss of one rank is prepared for."""
    return all(rank.state == "serving" for rank in status.ranks) and status.lattice.get("1 rank", 1.0) == 1.0


async def until(
    client: AsyncClient, holds: Callable[[Status], bool], limit_s: float = 300.0, every_s: float = 0.1
) -> Status:
    """The first status for which `holds` is true. Raises TimeoutError with the last states of the ranks."""
    end, last = time.monotonic() + limit_s, ""
    while True:
        try:
            status = await client.status()
        except Unreachable as error:  # the front may be restarting
            last = str(error)
        else:
            if holds(status):
                return status
            states = ", ".join(f"{rank.id} {rank.state}" for rank in status.ranks)
            last = f"ranks {states}; prepared {dict(status.lattice)}"
        if time.monotonic() > end:
            raise TimeoutError(f"not within {limit_s:.0f} s: {last}")
        await asyncio.sleep(every_s)
