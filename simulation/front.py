"""One front: the real loop, recovery, planner, journal and request processor, put together as in `serving.app`, and
killed as a process is."""

import asyncio
import contextlib
import functools
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from serving.core.engine_shell import EngineShell
from serving.core.journal import Journal
from serving.core.loop import Loop
from serving.core.request_log import RequestLog
from serving.core.request_processor import RequestProcessor
from serving.core.step_stats import StepStats
from serving.engine.integrity import check_integrity
from serving.errors import MoejaxError
from serving.executor.executor import RankExecutor
from serving.executor.failure_detector import FailureDetectorSettings
from serving.executor.incarnation import Loss
from serving.launch.weights_record import WeightsRecord
from serving.observability.metrics import Metrics
from serving.protocol.events import Event, EventKind, EventLog
from serving.recovery.failover import Failover
from serving.text.structured_output import GrammarMatcher
from serving.text.tokenizer import Tokenizer
from simulation.byte_tokenizer import byte_tokenizer
from simulation.hand_model import PREPARED
from simulation.launch import Processes, SimulatedListener, SimulatedStarter
from simulation.virtual_time import VirtualTimeLoop, context_of, is_item_of_stream
from simulation.world import World

REAP_TURNS = 200
"""Most turns of the event loop that the tasks of a killed front take to be gone."""


class CheckedEngine(EngineShell):
    """The engine's state, each value of which conserves pages, places and requests."""

    violated: ClassVar[Callable[[str], None]]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "state" and value is not (before := self.__dict__.get("state")):
            try:
                check_integrity(value, before)
            except AssertionError as error:
                type(self).violated(f"the engine's state: {error}")
        super().__setattr__(name, value)


def checked_engine(world: World) -> type[EngineShell]:
    """The engine of the fronts of a world."""
    return type("CheckedEngine", (CheckedEngine,), {"violated": staticmethod(world.violated)})


class TracedEvents(EventLog):
    """The events of a front, which are lines of the trace."""

    world: World

    def emit(self, kind: EventKind, epoch: int, **fields: Any) -> Event:
        """See `EventLog.emit`."""
        given = {name: value for name, value in fields.items() if value not in ("", None) and name != "phases"}
        self.world.note(f"event {kind} in epoch {epoch}" + "".join(f", {name} {v}" for name, v in given.items()))
        return super().emit(kind, epoch, **fields)


class Front:
    """A front of a world; the first has number 1."""

    def __init__(self, world: World, processes: Processes, number: int) -> None:
        self.world = world
        self.number = number
        self.dead = False
        self.listening = False
        self.ready = asyncio.Event()
        self.ended = asyncio.Event()
        """It runs no more."""
        self.context = context_of(self)
        self.executor: RankExecutor
        self.failover: Failover | None = None
        self.loop: Loop | None = None
        self.processor: RequestProcessor | None = None
        self._processes = processes
        self._request_log: RequestLog | None = None
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Start the process."""
        self.world.note(f"front {self.number} starts")
        self._task = asyncio.get_running_loop().create_task(self._run(), context=self.context)

    def task(self, coroutine: Any) -> "asyncio.Task[Any]":
        """Run something in this process."""
        return asyncio.get_running_loop().create_task(coroutine, context=self.context.copy())

    async def stop(self) -> None:
        """Drain for no time, and end every process."""
        self._stop.set()
        await self.ended.wait()

    async def kill(self) -> None:
        """The process is killed: nothing of it runs any more, and nobody receives anything of it."""
        if self.dead or self.ended.is_set():
            return
        self.check_errors()
        self.dead = True
        self.world.note(f"front {self.number} is killed")
        if self._request_log is not None:
            self._request_log.close()
        self.world.front_died(self)
        await self._reap()
        if self.failover is not None:
            self.failover.kv_replicas.close()
        self.ended.set()

    async def _reap(self) -> None:
        """Remove the tasks of this process. What they do when they are cancelled reaches nobody."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        for _ in range(REAP_TURNS):
            left = [task for task in loop.tasks_of(self) if task is not asyncio.current_task()]
            if not left:
                return
            for task in left:
                task.cancel()
            await asyncio.sleep(0)
        self.world.violated(f"front {self.number} cannot be ended: {loop.tasks_of(self)}")

    def check_errors(self) -> None:
        """No task of a front may end with an error that nobody sees, and the engine never stops."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        answers = self.loop.engine.pipeline.answers if self.loop is not None else ()
        for owner, task, error in loop.unseen_errors():
            read_in_turn = task in answers or is_item_of_stream(task)  # a reader sees the error when it comes to it
            if owner is self and not read_in_turn:
                calls = traceback.extract_tb(error.__traceback__)[-4:]
                at = ", ".join(f"{Path(call.filename).name}:{call.lineno}" for call in calls)
                self.world.violated(f"a task of front {self.number} died of {type(error).__name__}: {error} ({at})")

    async def _run(self) -> None:
        try:
            async with contextlib.AsyncExitStack() as stack:
                await self._start(stack)
                self.ready.set()
                self.world.note(f"front {self.number} serves")
                await self._stop.wait()
                self.check_errors()
        except asyncio.CancelledError:
            if not self.dead:
                raise
        except (MoejaxError, TimeoutError) as error:
            self.world.note(f"front {self.number} could not start: {type(error).__name__}: {error}")
        except Exception as error:
            self.world.violated(f"front {self.number} died of {type(error).__name__}: {error}")
        finally:
            self.listening = False
            if not self.dead:
                self.dead = True
                self.world.front_died(self)
                await self._reap()
                self.ended.set()

    async def _start(self, stack: contextlib.AsyncExitStack) -> None:
        """As `serving.app.App.start`."""
        world, settings, model = self.world, self.world.settings, self.world.scenario.model()
        info = model.info()
        self._request_log = request_log = self._open_request_log()
        stack.callback(request_log.close)

        def lost(loss: Loss) -> None:
            world.note(f"front {self.number} loses rank {loss.rank}: {loss.cause}")
            world.check_loss(loss)
            failover.on_rank_lost(loss)

        health = FailureDetectorSettings(
            heartbeat_floor_s=settings.heartbeat_floor_s,
            step_floor_s=settings.step_floor_s,
            command_limit_s=settings.command_limit_s,
            starved_factor=settings.starved_factor,
        )
        self.executor = executor = RankExecutor(
            health,
            lost,
            SimulatedStarter(world, self, self._processes),
            on_copied=lambda rank, copied: failover.kv_replicas.receive(rank, copied),
            on_starved=lambda rank, evidence: failover.on_rank_starved(rank, evidence),
        )
        stack.push_async_callback(executor.close)
        await executor.open(SimulatedListener(heartbeat_s=settings.heartbeat_s, listens=self._listen))
        weights_record = WeightsRecord(world.disk.folder, PREPARED.content)
        step_stats, wake = StepStats(settings, info), asyncio.Event()
        events = TracedEvents()
        events.world = world
        self.failover = failover = Failover(
            settings,
            model,
            executor,
            lambda text: world.note(f"front {self.number}: {text}"),
            events=events,
            expert_load=lambda: step_stats.expert_load,
            wake=wake.set,
            epoch=request_log.epoch,
            weights=weights_record.load(),
            weights_record=weights_record,
        )
        stack.push_async_callback(failover.close)
        async with asyncio.timeout(settings.start_timeout_s):
            await failover.start()
        tokenizer, grammar_matcher = _text()
        self.loop = loop = Loop(
            settings,
            info,
            world.limits,
            executor,
            failover,
            grammar_matcher,
            request_log,
            events=events,
            step_stats=step_stats,
            wake=wake,
        )
        self.processor = processor = RequestProcessor(loop, tokenizer, Metrics(loop), grammar_matcher)
        loop.start()
        stack.push_async_callback(loop.drain, 0.0)
        reader = asyncio.create_task(processor.read_unattended(request_log.running()))
        stack.callback(reader.cancel)

    def _listen(self) -> None:
        self.listening = True

    def _open_request_log(self) -> RequestLog:
        world = self.world
        if not world.scenario.journal:
            return RequestLog(None)
        journal, records = Journal.open(world.disk.folder)
        return RequestLog(journal, records, retention_s=world.settings.resume_s, wall=world.wall)


@functools.cache
def _text() -> tuple[Tokenizer, GrammarMatcher]:
    """The tokenizer, which is the same for all fronts, and structured output over it."""
    tokenizer = byte_tokenizer()
    return tokenizer, GrammarMatcher(tokenizer, PREPARED.vocab_size, PREPARED.stop_tokens)
