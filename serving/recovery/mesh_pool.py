"""Meshes of ranks that are ready to run: compiled, loaded, then connected.

A plan whose mesh is connected can be adopted at once.
"""

import asyncio
import collections
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Iterable

from serving.executor.executor import RankExecutor
from serving.executor.mesh_key import MeshKey
from serving.executor.rank_errors import CommandFailed, RankLost
from serving.launch.process import shared_file
from serving.proto.moejax.v1 import link_pb2
from serving.protocol import clock
from serving.recovery.membership_events import (
    ConnectBegan,
    LoadedDropped,
    MeshConnected,
    MeshLoaded,
    ServiceLost,
)
from serving.recovery.recovery_state import RecoveryState
from serving.recovery.rendezvous import PING_TIMEOUT_S

COLLECTIVE_TIMEOUT_S = 30
"""How long ranks wait for each other in a collective, or to connect a mesh."""
COMPILE_TIMEOUT_S = 600
"""Seconds that a rank has to compile a mesh while the server waits for it. A rank that compiles nothing yet is asked
with Ping first, so that no rank whose main thread is stuck is waited for as long."""
LOAD_TIMEOUT_S = 60
"""Seconds that ranks have to load the executables of a mesh while the server waits for it."""
AHEAD_TIMEOUT_S = LOAD_TIMEOUT_S
"""Seconds that ranks have to load the executables of a mesh beside the steps. Then the mesh is not loaded ahead, and a
rank that has not answered is lost, where others have."""
ABORTED_S = 1.0
"""Seconds that ranks have to answer once they were asked to give up connecting."""


class MeshPool:
    """Loads and connects meshes; the membership says which are `loaded` and `connected` in this generation."""

    def __init__(self, executor: RankExecutor, state: RecoveryState, log: Callable[[str], None]) -> None:
        self._state = state
        self._shares_memory = False
        self._executor = executor
        self._log = log
        self._connects = 0
        self._loading: asyncio.Task[None] | None = None

    @property
    def shares_memory(self) -> bool:
        """True when ranks exchange through shared memory, and connect without the coordination service."""
        return self._shares_memory

    def on_configured(self, *, shares_memory: bool) -> None:
        """A rank has answered how it exchanges; all do so in the same way."""
        self._shares_memory = shares_memory

    @property
    def loading(self) -> bool:
        """True while meshes are being loaded ahead."""
        return self._loading is not None and not self._loading.done()

    @property
    def idle(self) -> bool:
        """True when no mesh is being loaded ahead, and none waits to be connected."""
        return not (self.loading or self._state.membership.loaded)

    def take_loaded(self) -> MeshKey:
        """The loaded mesh that is to be connected next; it is not `loaded` any more."""
        mesh = self._state.membership.loaded[0]
        self._state.record(ConnectBegan(mesh))
        return mesh

    def stop(self) -> None:
        """Stop loading ahead, and drop the meshes that wait to be connected."""
        if self._loading is not None:
            self._loading.cancel()
        self._state.record(LoadedDropped())

    async def compile(self, keys: Iterable[MeshKey]) -> None:
        """Compile the meshes whose executables are missing: each mesh shape once for each store of executables, on one
        of the ranks that share the store. Raises RankLost or CommandFailed."""
        jobs: dict[tuple[int, int, int, str], tuple[MeshKey, list[int]]] = {}
        for key in keys:
            for store, sharing in self._by_executable_store(key).items():
                jobs.setdefault((len(key.ranks), key.slots, key.attention, store), (key, sharing))
        began = clock.now()
        queue = collections.deque(sorted(jobs.values(), key=lambda job: -len(job[0].ranks)))
        total, done = len(queue), 0
        busy: set[int] = set()
        self._log(f"compiling for {total} mesh shapes (found in the cache after the first start)")

        async def compile_on(rank: int, key: MeshKey) -> None:
            nonlocal done
            answer = await self._executor.call(rank, "compile", link_pb2.Compile(mesh=key.message()))
            done += 1
            busy.discard(rank)
            if answer.compiled:
                self._log(
                    f"compiled {answer.compiled} programs for {len(key.ranks)} ranks x {key.slots} slots "
                    f"({done}/{total}, {clock.now() - began:.0f} s)"
                )

        running: set[asyncio.Task[None]] = set()
        while queue or running:
            for key, sharing in list(queue):
                rank = next((r for r in sharing if r not in busy), None)
                if rank is not None:
                    queue.remove((key, sharing))
                    busy.add(rank)
                    running.add(asyncio.create_task(compile_on(rank, key)))
            finished, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                task.result()

    async def build(self, key: MeshKey) -> None:
        """Compile and load a mesh that was not prepared ahead, before all others. Raises RankLost, CommandFailed or
        TimeoutError."""
        await self._compile_one(key)
        await self.load(key, urgent=True)

    async def load(self, key: MeshKey, *, urgent: bool = False) -> None:
        """Load the executables of a mesh on all its ranks; `urgent` while the server waits for it. Raises RankLost or
        CommandFailed, and TimeoutError when it is urgent, or ranks with other code do not compile in time."""
        await self._load(key, urgent=urgent, limit_s=LOAD_TIMEOUT_S if urgent else None)

    def load_ahead(self, current: MeshKey, keys: Iterable[MeshKey]) -> None:
        """Load these meshes in the background, after what is missing of the mesh in force; each is in `loaded` then."""
        self.stop()
        self._loading = asyncio.create_task(self._load_ahead(current, tuple(keys)))

    async def connect(self, key: MeshKey, epoch: int, *, warm: bool) -> None:
        """Connect the communicator of a mesh that is loaded; `warm` when its ranks hold the weights now that it needs.
        Raises RankLost, CommandFailed or TimeoutError."""
        if self._state.membership.service_lost:
            raise CommandFailed(key.ranks[0], "connect", "ranks have left the coordination service")
        async with self._losing_silent(key.ranks, "connect", COLLECTIVE_TIMEOUT_S, after_s=ABORTED_S):
            self._connects += 1
            number = self._connects
            try:
                with shared_file() as exchange:
                    connect = link_pb2.Connect(mesh=key.message(), warm=warm, exchange=exchange, number=number)
                    await self._executor.call_all("connect", dict.fromkeys(key.ranks, connect))
            except (RankLost, CommandFailed, asyncio.CancelledError) as error:  # the others must not wait for this rank
                if not self._shares_memory:
                    self._state.record(ServiceLost())
                gone = error.rank if isinstance(error, RankLost) else None
                self._executor.abort((r for r in key.ranks if r != gone), epoch, connecting=number)
                raise
        self._state.record(MeshConnected(key))

    @contextlib.asynccontextmanager
    async def _losing_silent(
        self, ranks: Collection[int], what: str, limit_s: float | None, *, after_s: float = 0.0
    ) -> AsyncIterator[None]:
        """A block in which these ranks are called. After `limit_s` seconds, if there is a limit, it ends with
        TimeoutError, and ranks that have not answered `after_s` seconds later are lost, where others have."""
        try:
            async with asyncio.timeout(limit_s):
                yield
        except TimeoutError:
            await asyncio.sleep(after_s)
            why = f"no answer to {what} within {limit_s} s"
            self._executor.lose_unanswered(ranks, what, why, unless_all=True)
            raise TimeoutError(why) from None

    async def _compile_one(self, key: MeshKey) -> None:
        """Compile what is missing of one mesh, on one of the ranks that share a store of executables and the code.
        Raises RankLost, CommandFailed or TimeoutError."""
        compilers = [sharing[0] for sharing in self._by_executable_store(key).values()]
        idle = [rank for rank in compilers if not self._compiles(rank)]
        async with self._losing_silent(idle, "ping", PING_TIMEOUT_S):
            await self._executor.call_all("ping", dict.fromkeys(idle, link_pb2.Ping()))
        async with self._losing_silent(compilers, "compile", COMPILE_TIMEOUT_S):
            await self._executor.call_all("compile", dict.fromkeys(compilers, link_pb2.Compile(mesh=key.message())))

    async def _load(self, key: MeshKey, *, urgent: bool, limit_s: float | None) -> None:
        """As `load`; ranks have `limit_s` seconds to load, and no limit without it."""
        if len({self._build_of(rank) for rank in key.ranks}) > 1:  # an upgrade: other code has other programs
            await self._compile_one(key)
        prepare = dict.fromkeys(key.ranks, link_pb2.Prepare(mesh=key.message(), urgent=urgent))
        async with self._losing_silent(key.ranks, "prepare", limit_s):
            await self._executor.call_all("prepare", prepare)

    async def _load_ahead(self, current: MeshKey, keys: Iterable[MeshKey]) -> None:
        for key in (current, *keys):
            try:
                await self._load(key, urgent=False, limit_s=AHEAD_TIMEOUT_S)
            except (RankLost, CommandFailed):
                continue
            except TimeoutError as error:
                self._log(f"the mesh of ranks {key.ranks} is not loaded ahead: {error}")
                continue
            if key != current:
                self._state.record(MeshLoaded(key))

    def _by_executable_store(self, key: MeshKey) -> dict[str, list[int]]:
        """The ranks of a mesh by the store of executables that they share, and by the code that they run: during an
        upgrade it differs, and with it what is compiled. The store of the front's host is ""."""
        found: dict[str, list[int]] = {}
        for rank in key.ranks:
            host_paths = self._executor.host_paths(rank)
            store = "" if host_paths is None else host_paths.disk
            found.setdefault(f"{store} {self._build_of(rank)}", []).append(rank)
        return found

    def _compiles(self, rank: int) -> bool:
        """Whether a rank still compiles a mesh that nobody waits for any more."""
        process = self._executor.get(rank)
        return process is not None and process.leaves_unanswered("compile")

    def _build_of(self, rank: int) -> str:
        """The code that a rank runs."""
        process = self._executor.get(rank)
        return "" if process is None else process.build
