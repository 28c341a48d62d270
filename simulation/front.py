"""One front: the real loop, or the two of a server with pools, recovery, planner, journal and request processor, put
together as in `serving.app`, and killed as a process is."""

import asyncio
import contextlib
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, ClassVar

from planner.plan.shape import POOLS
from serving.config import Settings
from serving.core.engine_shell import EngineShell
from serving.core.journal import Journal
from serving.core.loop import Loop
from serving.core.pools import Pools, start_pools
from serving.core.request_log import RequestLog
from serving.core.request_processor import RequestProcessor
from serving.core.start import ServerParts, start_loop
from serving.engine.integrity import check_integrity
from serving.errors import MoejaxError
from serving.executor.executor import RankExecutor
from serving.executor.failure_detector import FailureDetectorSettings
from serving.executor.incarnation import Loss
from serving.launch.launcher import Launcher
from serving.launch.rank_listener import RelayMethod
from serving.launch.rank_process import RankStarter
from serving.launch.weights_record import WeightsRecord
from serving.observability.metrics import Metrics
from serving.protocol.events import Event, EventKind, EventLog
from simulation.byte_tokenizer import byte_tokenizer
from simulation.hand_model import PREPARED
from simulation.launch import AnyHost, Processes, SimulatedListener, SimulatedStarter
from simulation.link import Origin
from simulation.virtual_time import VirtualTimeLoop, context_of, is_item_of_stream
from simulation.world import World

_TOKENIZER = byte_tokenizer()  # one for all fronts of all seeds: making it takes longer than many a front lives

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


class CheckedExecutor(RankExecutor):
    """The executor of a front, each loss of which is in the trace and keeps the laws of its world."""

    world: ClassVar[World]

    def __init__(
        self, health: FailureDetectorSettings, on_lost: Callable[[Loss], None], starter: RankStarter, **others: Any
    ) -> None:
        def lost(loss: Loss) -> None:
            self.world.note(f"the front loses rank {loss.rank}: {loss.cause}")
            self.world.check_loss(loss)
            on_lost(loss)

        super().__init__(health, lost, starter, **others)


def checked_executor(world: World) -> type[RankExecutor]:
    """The executor of the fronts of a world."""
    return type("CheckedExecutor", (CheckedExecutor,), {"world": world})


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
        self.ready = asyncio.Event()
        self.ended = asyncio.Event()
        """It runs no more."""
        self.context = context_of(self)
        self.backend: Loop | Pools | None = None
        self.processor: RequestProcessor | None = None
        self._processes = processes
        self._executors: dict[int, RankExecutor] = {}
        """By rank, the executors that listen."""
        self.relay: RelayMethod | None = None
        """Serves the streams of host agents; None before the front listens."""
        self._request_log: RequestLog | None = None
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def loops(self) -> tuple[Loop, ...]:
        """The loops that serve; none while the front starts."""
        if self.backend is None:
            return ()
        return self.backend.loops if isinstance(self.backend, Pools) else (self.backend,)

    def executor_of(self, rank: int) -> RankExecutor | None:
        """The executor that a rank dials; None before the front listens to it."""
        return self._executors.get(rank)

    def attach_service(self, rank: int) -> RankExecutor | None:
        """See `simulation.link.Peer`."""
        return self.executor_of(rank)

    def origin(self, rank: int) -> Origin:
        """See `simulation.link.Peer`."""
        return Origin(self, self._executors[rank], {})

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
        for each in self.loops:
            each.failover.kv_replicas.close()
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
        answers = {answer for each in self.loops for answer in each.engine.pipeline.answers}
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
            self._executors.clear()
            self.relay = None
            if not self.dead:
                self.dead = True
                self.world.front_died(self)
                await self._reap()
                self.ended.set()

    async def _start(self, stack: contextlib.AsyncExitStack) -> None:
        """As `serving.app.App.start`."""
        world, model = self.world, self.world.scenario.model()
        self._request_log = request_log = self._open_request_log()
        stack.callback(request_log.close)
        weights_record = WeightsRecord(world.disk.folder, PREPARED.content)
        events = TracedEvents()
        events.world = world
        parts = ServerParts(
            settings=world.settings,
            model=model,
            info=model.info(),
            tokenizer=_TOKENIZER,
            request_log=request_log,
            events=events,
            weights=weights_record.load(),
            weights_record=weights_record,
            run=None,
            log=lambda text: world.note(f"front {self.number}: {text}"),
            launcher=self._launcher,
        )
        start = start_pools if world.settings.arch == POOLS else start_loop
        self.backend = backend = await start(stack, parts)
        self.processor = processor = RequestProcessor(
            backend, parts.tokenizer, Metrics(backend), backend.grammar_matcher
        )
        backend.start()
        stack.push_async_callback(backend.drain, 0.0)
        reader = asyncio.create_task(processor.read_unattended(request_log.running()))
        stack.callback(reader.cancel)

    def _launcher(self, settings: Settings, *_: object, ranks: Collection[int] | None) -> Launcher:
        """See `serving.launch.launcher.Launcher.of`."""

        def listens(executor: RankExecutor, relay: RelayMethod | None) -> None:
            self.relay = relay
            self._executors |= dict.fromkeys(range(settings.ranks) if ranks is None else ranks, executor)

        return Launcher(
            starter=SimulatedStarter(self.world, self, self._processes, ranks),
            listener=SimulatedListener(heartbeat_s=settings.heartbeat_s, host_pool=AnyHost(), listens=listens),
        )

    def _open_request_log(self) -> RequestLog:
        world = self.world
        if not world.scenario.journal:
            return RequestLog(None)
        journal, records = Journal.open(world.disk.folder)
        return RequestLog(journal, records, retention_s=world.settings.resume_s, wall=world.wall)
