"""Meshes of ranks made ready to run: compiled, loaded, then connected. One that is all three can be adopted at once."""

import asyncio
import collections
import time
from collections.abc import Callable, Iterable

from serving.links import RankLinks, RankLost, RankRefused
from serving.mesh_key import MeshKey
from serving.proto.moejax.v1 import link_pb2
from serving.shared_memory import shared_file

COLLECTIVE_TIMEOUT_S = 30


class Meshes:
    """What the ranks of a server have ready in this generation."""

    def __init__(self, links: RankLinks, say: Callable[[str], None]) -> None:
        self.connected: set[MeshKey] = set()
        self.loaded: collections.deque[MeshKey] = collections.deque()
        """Meshes whose executables are loaded and whose communicator waits to be connected."""
        self.torn = False
        """Ranks had to leave the coordination service: this generation can connect no further mesh."""
        self.shares_memory = False
        """Ranks exchange through memory, and connect without the coordination service."""
        self._links = links
        self._say = say
        self._connects = 0
        self._loading: asyncio.Task[None] | None = None

    @property
    def idle(self) -> bool:
        """Nothing is being loaded ahead, and nothing waits to be connected."""
        return not self.loaded and (self._loading is None or self._loading.done())

    def clear(self) -> None:
        """A new generation has nothing yet."""
        self.torn = False
        self.connected.clear()
        self.loaded.clear()

    def forget(self, rank: int) -> None:
        """A rank is gone: so is every mesh with it."""
        self.connected = {key for key in self.connected if rank not in key.ranks}
        self.loaded = collections.deque(key for key in self.loaded if rank not in key.ranks)

    def stop(self) -> None:
        """Load nothing ahead any more; what was waits no longer to be connected."""
        if self._loading is not None:
            self._loading.cancel()
        self.loaded.clear()

    async def compile(self, keys: Iterable[MeshKey]) -> None:
        """Compile what is missing, each mesh shape on one rank of those that share a store of executables."""
        jobs: dict[tuple[int, int, int, str], tuple[MeshKey, list[int]]] = {}
        for key in keys:
            for disk, there in self._by_disk(key).items():
                jobs.setdefault((len(key.ranks), key.slots, key.attention, disk), (key, there))
        began = time.monotonic()
        queue = collections.deque(sorted(jobs.values(), key=lambda job: -len(job[0].ranks)))
        total, done = len(queue), 0
        busy: set[int] = set()
        self._say(f"compiling for {total} mesh shapes (found in the cache after the first start)")

        async def one(rank: int, key: MeshKey) -> None:
            nonlocal done
            answer = await self._links.call(rank, "compile", link_pb2.Compile(mesh=key.message()))
            done += 1
            busy.discard(rank)
            if answer.compiled:
                self._say(
                    f"compiled {answer.compiled} programs for {len(key.ranks)} ranks x {key.slots} slots "
                    f"({done}/{total}, {time.monotonic() - began:.0f} s)"
                )

        running: set[asyncio.Task[None]] = set()
        while queue or running:
            for key, there in list(queue):
                rank = next((r for r in there if r not in busy), None)
                if rank is not None:
                    queue.remove((key, there))
                    busy.add(rank)
                    running.add(asyncio.create_task(one(rank, key)))
            finished, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                task.result()

    async def make(self, key: MeshKey) -> None:
        """Compile a mesh that nobody foresaw, and load it, before anything else."""
        compilers = [there[0] for there in self._by_disk(key).values()]
        await self._links.call_all("compile", dict.fromkeys(compilers, link_pb2.Compile(mesh=key.message())))
        await self.load(key, urgent=True)

    async def load(self, key: MeshKey, *, urgent: bool = False) -> None:
        """Load the executables of a mesh on all its ranks. Raises RankLost or RankRefused."""
        prepare = link_pb2.Prepare(mesh=key.message(), urgent=urgent)
        await self._links.call_all("prepare", dict.fromkeys(key.ranks, prepare))

    def load_ahead(self, here: MeshKey, keys: Iterable[MeshKey]) -> None:
        """Load these in the background, and before them what is missing of the mesh in force; each is `loaded` then."""
        self.stop()
        self._loading = asyncio.create_task(self._load_ahead(here, tuple(keys)))

    async def connect(self, key: MeshKey, epoch: int, *, warm: bool) -> None:
        """Connect the communicator of a mesh that is loaded; `warm` when its ranks hold now what they would in it.
        Raises RankLost, RankRefused or TimeoutError."""
        if self.torn:
            raise RankRefused(key.ranks[0], "connect", "ranks have left the coordination service")
        async with asyncio.timeout(COLLECTIVE_TIMEOUT_S):
            self._connects += 1
            number = self._connects
            try:
                with shared_file() as exchange:
                    connect = link_pb2.Connect(mesh=key.message(), warm=warm, exchange=exchange, number=number)
                    await self._links.call_all("connect", dict.fromkeys(key.ranks, connect))
            except (RankLost, RankRefused, asyncio.CancelledError) as error:  # the others must not wait for that one
                self.torn = not self.shares_memory
                gone = error.rank if isinstance(error, RankLost) else None
                self._links.abort((r for r in key.ranks if r != gone), epoch, connecting=number)
                raise
        self.connected.add(key)

    async def _load_ahead(self, here: MeshKey, keys: Iterable[MeshKey]) -> None:
        for key in (here, *keys):
            try:
                await self.load(key)
            except (RankLost, RankRefused):
                continue
            if key != here:
                self.loaded.append(key)

    def _by_disk(self, key: MeshKey) -> dict[str, list[int]]:
        """The ranks of a mesh by the store of executables they share; the front's own is ""."""
        found: dict[str, list[int]] = {}
        for rank in key.ranks:
            home = self._links.home(rank)
            found.setdefault("" if home is None else home.disk, []).append(rank)
        return found
