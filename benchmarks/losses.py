"""One loss of a rank under load: the kill, the stalls of the client's streams, and the record of the loss."""

import asyncio
import contextlib
import dataclasses
import os
import random
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

from benchmarks.stalls import Spread, added_stall_ms, longest_gap_ms, median_gap_ms
from benchmarks.streams import Known, Load, Trace, until, whole
from serving.api.client import AsyncClient
from serving.errors import Unreachable
from serving.protocol.events import Event
from serving.protocol.status import Status

ADOPTION = ("fence", "plan", "adopt")
"""Phases of a recovery from the evidence to a mesh that can run the next step."""
_QUIET_TOKENS = 16  # of each stream between the last placement and the kill, for its median gap
_LIMIT_S = 180.0
_AGAIN_S = 0.02
_CLOCKS_S = 1e-3  # how far the two clocks may drift apart between two readings


@dataclasses.dataclass(frozen=True)
class Moments:
    """Time of the event, in seconds of the client's monotonic clock."""

    quiet: float
    """Time at which all streams had been placed."""
    kill: float
    lost: float
    recovered: float
    rejoining: float
    rejoined: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossRecord:
    """The cost of one loss. Stalls are added stalls in milliseconds, over streams; `stalls` has each."""

    victim: int
    signal: str
    detect_ms: float
    adopt_ms: float
    phases: dict[str, float]
    survivor_stall_ms: Spread
    moved_stall_ms: Spread
    stalls: dict[str, list[float]]
    rejoin_pause_ms: float | None
    rejoin_ms: float
    whole_after_s: float
    context_tokens: int
    gap_ms: float | None
    compiles_between: int
    tokens_restored: int
    tokens_recomputed: int
    preemptions: int
    requests: int
    failed: int
    tokens_changed: int


class EventFeed:
    """The server's events as they come, with their times on the client's monotonic clock."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._events: list[Event] = []
        self._more = asyncio.Event()
        self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            with contextlib.suppress(Unreachable):  # the front died; the next one has events of its own
                async for event in self._client.watch():
                    self._events.append(event)
                    self._more.set()
            await asyncio.sleep(_AGAIN_S)

    def after(self, kind: str, moment: float, rank: int | None = None) -> Event | None:
        """The first event of a kind, and of a rank if given, since a moment of the monotonic clock."""
        fits = (e for e in self._events if e.kind == kind and rank in (None, e.rank))
        return next((e for e in fits if local(e) >= moment - _CLOCKS_S), None)

    def all(self, kind: str) -> list[Event]:
        """The events of a kind so far."""
        return [event for event in self._events if event.kind == kind]

    async def wait(self, kind: str, moment: float, rank: int | None = None) -> Event:
        """As `after`, but waits for the event. Raises TimeoutError when that takes minutes."""
        try:
            async with asyncio.timeout(_LIMIT_S):
                while (event := self.after(kind, moment, rank)) is None:
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            last = [f"{e.kind} {e.rank} {e.cause}" for e in self._events[-5:]]
            raise TimeoutError(f"no {kind!r} within {_LIMIT_S:.0f} s; the last events: {last}") from None
        return event

    def close(self) -> None:
        """Stop following the events."""
        self._task.cancel()


def local(event: Event) -> float:
    """The time of the event on this process's monotonic clock: server and client run on one machine."""
    return event.time - (time.time() - time.monotonic())


def kill_order(kills: int, ranks: int) -> list[tuple[int, signal.Signals]]:
    """Victims in turn, the turn shifted by one each round; every fourth loss, one at least, is a SIGSTOP."""
    stops = set(range(3, kills, 4)) or {kills - 1}
    order = [(i + i // ranks) % ranks for i in range(kills)]
    return [(rank, signal.SIGSTOP if i in stops else signal.SIGKILL) for i, rank in enumerate(order)]


async def lose_rank(
    client: AsyncClient,
    feed: EventFeed,
    known: Known,
    victim: int,
    how: signal.Signals,
    *,
    context: int,
    draw: random.Random,
) -> LossRecord:
    """Place the streams, send the signal at mean context `context`, keep up load until the rank is back."""
    await until(client, whole)
    load = Load(client, known.asks)
    placed = await load.place(known.asks)
    quiet = time.monotonic()
    began = [len(trace.tokens) for trace in placed]

    def due() -> bool:
        steady = all(len(t.tokens) >= n + _QUIET_TOKENS for t, n in zip(placed, began, strict=True))
        return steady and mean_context(known, placed) >= context

    while not due() and all(len(t.tokens) < t.ask.max_tokens for t in placed):
        await asyncio.sleep(0.002)
    await asyncio.sleep(draw.uniform(0, 0.05))  # any moment of a step
    before, reached = await client.status(), mean_context(known, placed)
    pid = before.ranks[victim].pid
    assert pid is not None, f"rank {victim} is {before.ranks[victim].state}"
    kill = time.monotonic()
    os.kill(pid, how)
    lost = await feed.wait("rank_lost", kill, victim)
    recovered = await feed.wait("recovered", local(lost))
    rejoined = await feed.wait("rejoined", local(recovered), victim)
    after = await until(client, whole)
    whole_at = time.monotonic()
    traces = await load.stop()
    rejoin_ms = rejoined.phases.get("total", 0.0)
    moments = Moments(quiet, kill, local(lost), local(recovered), local(rejoined) - rejoin_ms / 1e3, local(rejoined))
    stalls = stalls_of(placed, victim, moments)
    return LossRecord(
        victim=victim,
        signal=how.name,
        detect_ms=round(1e3 * (moments.lost - kill), 1),
        adopt_ms=round(sum(recovered.phases.get(phase, 0.0) for phase in ADOPTION), 1),
        phases={name: round(ms, 1) for name, ms in recovered.phases.items()},
        survivor_stall_ms=Spread.of(stalls["survivors"]),
        moved_stall_ms=Spread.of(stalls["moved"]),
        stalls=stalls,
        rejoin_pause_ms=rejoin_pause_ms(traces, moments),
        rejoin_ms=round(rejoin_ms, 1),
        whole_after_s=round(whole_at - kill, 1),
        context_tokens=round(reached),
        gap_ms=middle(median_gap_ms(trace.times, quiet, kill) for trace in placed),
        compiles_between=compiles_between(before, after),
        tokens_restored=after.tokens_restored - before.tokens_restored,
        tokens_recomputed=after.tokens_recomputed - before.tokens_recomputed,
        preemptions=after.preemptions - before.preemptions,
        requests=len(traces),
        failed=known.failed(traces),
        tokens_changed=known.changed(traces),
    )


def mean_context(known: Known, placed: Sequence[Trace]) -> float:
    """Mean number of tokens that a stream has in the cache."""
    return statistics.mean(known.prompt_tokens(trace.ask) + len(trace.tokens) for trace in placed)


def stalls_of(placed: Sequence[Trace], victim: int, at: Moments) -> dict[str, list[float]]:
    """Added stalls of the streams that had tokens before and after, by where they ran."""

    def stalls(belongs: Callable[[Trace], bool]) -> list[float]:
        found = [added_stall_ms(t.times, at.kill, at.recovered, since=at.quiet) for t in placed if belongs(t)]
        return [round(stall, 1) for stall in found if stall is not None]

    return {
        "survivors": stalls(lambda trace: trace.rank is not None and trace.rank != victim),
        "moved": stalls(lambda trace: trace.rank == victim),
    }


def rejoin_pause_ms(traces: Sequence[Trace], at: Moments) -> float | None:
    """The longest gap of any stream while the rank came back, less the usual one since the recovery. A gap that began
    before the recovery is of the loss, not of the rejoin."""
    usual = middle(median_gap_ms(trace.times, at.recovered, at.rejoining) for trace in traces)
    since = [[time for time in trace.times if time >= at.recovered] for trace in traces]
    pauses = [longest_gap_ms(times, at.rejoining, at.rejoined) for times in since]
    longest = max((pause for pause in pauses if pause is not None), default=None)
    return None if usual is None or longest is None else round(longest - usual, 1)


def compiles_between(before: Status, after: Status) -> int:
    """XLA compiles of the processes that are in both statuses."""
    same = [(b, a) for b in before.ranks for a in after.ranks if a.id == b.id and a.pid == b.pid]
    return sum(a.compiles - b.compiles for b, a in same)


def middle(values: Iterable[float | None]) -> float | None:
    """The median of the values that are not None."""
    return Spread.of(value for value in values if value is not None).median
