"""The host agent (`moejax rank --join`): keeps a slot for one rank on this host.

The agent dials the front until the front accepts it, prepares the model on this host, starts a rank's process when the
front orders it, and kills it when the front orders that. When the front is gone the agent dials again, and offers the
next front the rank that is still running. Every incarnation of a rank is a process of its own. The agent imports no
JAX, so that it can always kill a rank that hangs; the kernel kills the rank when the agent ends.
"""

import asyncio
import contextlib
import dataclasses
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Protocol

import grpc

from serving.errors import MoejaxError
from serving.launch.forkserver import Forkserver
from serving.launch.rank_channel import ENV_RELAY, RankChannel
from serving.launch.rank_process import ENV_STAY, ChildProcess, LaunchSpec, rank_forkserver
from serving.proto.moejax.v1 import link_pb2, link_pb2_grpc
from serving.protocol.prepared_model import PreparedModel, prepare_model
from serving.version import build

REDIAL_S, REDIAL_MAX_S, REFUSED_MAX_S = 0.5, 5.0, 30.0
"""Seconds before the front is dialed again. The wait doubles each time up to a bound, which is higher when the front
answered and refused this host."""
REDIAL_WITH_RANK_S = 0.1
"""Seconds before the front is dialed again while a rank waits for it."""
ORPHAN_TIMEOUT_S = 60.0
"""Seconds that a rank waits for the next front before the agent kills it, unless the offer says otherwise."""
CONDITION_S, CONDITION_STEP_S = 0.25, 0.02
"""Seconds between two looks at the rank's process, and by how much its run delay must have grown to be reported."""
REFUSALS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.FAILED_PRECONDITION)
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotOffer:
    """A slot as this host offers it, and what its ranks are started with. `secret` is the join token; `model` is where
    this host has the model, when that is not where the front has it; `device` is the number of the GPU, when there are
    several. A rank waits `orphan_timeout_s` seconds for the next front."""

    secret: str
    host: str
    rack: str = ""
    model: str | None = None
    threads: int = 1
    device: int | None = None
    orphan_timeout_s: float = ORPHAN_TIMEOUT_S


@dataclasses.dataclass(frozen=True)
class RunningRank:
    """The rank that runs in the slot: the order that started it, and its process."""

    order: link_pb2.StartRank
    process: ChildProcess

    def condition(self) -> link_pb2.RankCondition:
        """How the kernel sees the process now."""
        incarnation, state = self.order.incarnation, self.process.state
        return link_pb2.RankCondition(incarnation=incarnation, state=state, run_delay_s=self.process.run_delay_s())


class StreamRelay(Protocol):
    """Passes on what the front and the ranks of this host send each other: `serving.executor.host_relay`."""

    address: str
    """Where ranks of this host attach."""

    def expect(self, token: str) -> None:
        """A rank with this token may attach."""
        ...

    def forget(self, token: str) -> None:
        """No rank with this token may attach any more."""
        ...


class HostAgent:
    """The agent of one slot. Its ranks attach through `relay`, if there is one. `await run()` returns only when it is
    cancelled, and leaves no process of a rank then."""

    def __init__(
        self,
        channel: RankChannel,
        offer: SlotOffer,
        forkserver: Forkserver,
        log: Callable[[str], None],
        relay: StreamRelay | None = None,
    ) -> None:
        self._relay = relay
        self._channel = channel
        self._forkserver = forkserver
        self._offer = offer
        self._log_line = log
        self._last_line = ""
        self._reports: asyncio.Queue[link_pb2.PlaceReport | None] = asyncio.Queue()
        self._running: RunningRank | None = None
        self._condition: link_pb2.RankCondition | None = None
        """The condition of the rank that was reported last to this front."""
        self._front_lost_at: float | None = None
        """When the front was lost, on the monotonic clock; None while there is one."""
        self._prepared: tuple[link_pb2.PrepareModel, link_pb2.ModelPrepared] | None = None
        """The last order to prepare the model, and the answer to it."""
        self._preparing: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Keep the slot until cancelled."""
        pause, watching = REDIAL_S, asyncio.create_task(self._watch_rank())
        with tempfile.TemporaryDirectory(prefix="moejax-rank-") as logs:
            try:
                while True:
                    bound = REDIAL_MAX_S
                    try:
                        async for order in self._orders():
                            pause = REDIAL_S if order.HasField("start") else pause
                            self._obey(order, Path(logs))
                        self._log("the front has ended")
                    except grpc.RpcError as error:
                        code, why = error.code(), error.details()  # pyright: ignore[reportAttributeAccessIssue]
                        self._log(f"{self._channel.front}: {why or code.name}")
                        if code in REFUSALS:
                            bound = REFUSED_MAX_S
                            self._kill_rank()
                    self._front_lost()
                    await asyncio.sleep(pause if self._running is None else REDIAL_WITH_RANK_S)
                    pause = min(bound, 2 * pause)
            finally:
                watching.cancel()
                self._front_lost()
                self._kill_rank()

    async def _watch_rank(self) -> None:
        """Report the condition of the rank to the front whenever it has changed. It ends with the rank: how that ended
        is reported by itself."""
        while True:
            await asyncio.sleep(CONDITION_S)
            now, before = None if self._running is None else self._running.condition(), self._condition
            if now is None or now.state in ("", "X", "Z"):
                continue
            unchanged = before is not None and (before.incarnation, before.state) == (now.incarnation, now.state)
            if before is None or not unchanged or now.run_delay_s - before.run_delay_s >= CONDITION_STEP_S:
                self._condition = now
                self._reports.put_nowait(link_pb2.PlaceReport(condition=now))

    def _front_lost(self) -> None:
        """Stop preparing for the lost front. The rank that runs here waits for the next one, as long as is offered."""
        if self._preparing is not None:
            self._preparing.cancel()
        now, limit_s = time.monotonic(), self._offer.orphan_timeout_s
        self._front_lost_at = self._front_lost_at or now
        if self._running is not None and now - self._front_lost_at > limit_s:
            self._log(f"rank {self._running.order.rank} is ended: no front has come for {limit_s:.0f} s")
            self._kill_rank()

    def _obey(self, order: link_pb2.PlaceOrder, logs: Path) -> None:
        kind, running, self._front_lost_at = order.WhichOneof("what"), self._running, None
        if kind == "prepare":
            self._preparing = asyncio.create_task(self._prepare(order.prepare))
        elif kind == "start":
            self._start(order.start, logs)
        elif kind == "signal" and running is not None and running.order.incarnation == order.signal.incarnation:
            running.process.signal(order.signal.name)
        elif kind == "signal":  # that rank ended before this front was there to be informed of it
            ended = link_pb2.RankEnded(incarnation=order.signal.incarnation, code=-signal.SIGKILL)
            self._reports.put_nowait(link_pb2.PlaceReport(ended=ended))

    async def _prepare(self, order: link_pb2.PrepareModel) -> None:
        name = self._offer.model or order.model
        if self._running is not None and self._prepared is not None and self._prepared[0] == order:
            self._log(f"let in by {self._channel.front} with rank {self._running.order.rank}")
            self._reports.put_nowait(link_pb2.PlaceReport(prepared=self._prepared[1]))
            return
        self._log(f"let in by {self._channel.front}; preparing {name}")
        try:
            model = await prepare_model(
                name,
                order.data_type,
                in_place=order.in_place,
                dense=order.dense,
                kv_cache_type=order.kv_cache_type,
                mtp=order.mtp,
            )
            answer = prepared_message(model, self._offer.threads)
        except MoejaxError as error:
            answer = link_pb2.ModelPrepared(error=f"{error} (moejax rank --model says where this host has it)")
        self._prepared = order, answer
        self._reports.put_nowait(link_pb2.PlaceReport(prepared=answer))
        self._log(answer.error or f"{name} is prepared; waiting for a rank to start")

    def _start(self, order: link_pb2.StartRank, logs: Path) -> None:
        self._kill_rank()
        incarnation, device = order.incarnation, self._offer.device
        variables = self._channel.variables() | {ENV_STAY: "1"}
        if self._relay is not None and not order.own_stream:
            self._relay.expect(order.token)
            variables[ENV_RELAY] = self._relay.address
        variables |= {} if device is None else {"CUDA_VISIBLE_DEVICES": str(device)}
        spec = LaunchSpec.of(order.rank, self._channel.front, logs, self._offer.threads, order.token, variables)
        process = ChildProcess(spec.start(self._forkserver), spec, lambda _: self._rank_exited(incarnation))
        self._running = RunningRank(order, process)
        self._log(f"rank {order.rank} (pid {process.pid})")
        started = link_pb2.RankStarted(incarnation=incarnation, pid=process.pid)
        self._reports.put_nowait(link_pb2.PlaceReport(started=started))

    def _rank_exited(self, incarnation: int) -> None:
        if self._running is None or self._running.order.incarnation != incarnation:
            return
        self._forget_token(self._running)
        process, self._running = self._running.process, None
        output, code = process.last_output(), process.code or 0
        self._log(f"the rank ended with {f'signal {-code}' if code < 0 else f'code {code}: {output}'}")
        ended = link_pb2.RankEnded(incarnation=incarnation, code=code, said=output)
        self._reports.put_nowait(link_pb2.PlaceReport(ended=ended))

    def _kill_rank(self) -> None:
        if self._running is not None:
            self._running.process.end()
            self._forget_token(self._running)
            self._running = None

    def _forget_token(self, running: RunningRank) -> None:
        if self._relay is not None:
            self._relay.forget(running.order.token)

    async def _orders(self) -> AsyncIterator[link_pb2.PlaceOrder]:
        """Dial the front and yield its orders until it is gone."""
        reports = self._reports = asyncio.Queue()
        self._condition = None
        try:
            async with self._channel.open_aio() as connection:
                async for order in link_pb2_grpc.RankLinkStub(connection).Keep(self._outgoing(reports)):
                    yield order
        finally:
            reports.put_nowait(None)

    async def _outgoing(
        self, reports: "asyncio.Queue[link_pb2.PlaceReport | None]"
    ) -> AsyncIterator[link_pb2.PlaceReport]:
        """The reports of one stream: the offer of the slot, then what is put in the queue, until that is None."""
        offer = self._offer
        place = link_pb2.Place(token=offer.secret, host=offer.host, rack=offer.rack, build=build())
        if self._running is not None:
            order, pid = self._running.order, self._running.process.pid
            orphan = link_pb2.LeftRank(incarnation=order.incarnation, rank=order.rank, token=order.token, pid=pid)
            place.left.CopyFrom(orphan)
        yield link_pb2.PlaceReport(place=place)
        while (report := await reports.get()) is not None:
            yield report

    def _log(self, line: str) -> None:
        """Log a line that differs from the last one: a front that is not there is dialed many times."""
        if line != self._last_line:
            self._last_line = line
            self._log_line(line)


async def run_agents(
    channel: RankChannel, offers: Sequence[SlotOffer], log: Callable[[str], None], relay: StreamRelay | None = None
) -> None:
    """Run one agent for each slot until cancelled; ranks of all slots attach through `relay`, if there is one."""
    forkserver = rank_forkserver()
    forkserver.prepare()
    try:
        with contextlib.suppress(asyncio.CancelledError):
            async with asyncio.TaskGroup() as group:
                for offer in offers:
                    group.create_task(HostAgent(channel, offer, forkserver, log, relay).run())
    finally:
        forkserver.end()


def prepared_message(model: PreparedModel, threads: int) -> link_pb2.ModelPrepared:
    """The report of a prepared model for a slot whose ranks compute with so many threads. Compiled programs have the
    number of threads and the flags of XLA in their names (`moejax.runtime.executables`): slots that differ in either
    share none, though they have one folder."""
    executables = Path(model.executables)
    executables.mkdir(mode=0o700, parents=True, exist_ok=True)
    where, flags = os.stat(executables), os.environ.get("XLA_FLAGS", "")
    return link_pb2.ModelPrepared(
        config=model.config,
        content=model.content,
        store=model.store,
        executables=model.executables,
        disk=":".join(map(str, (BOOT_ID.read_text().strip(), where.st_dev, where.st_ino, threads, flags))),
        numerics=model.numerics,
    )
