"""The ranks of two pools on joined hosts: one host pool, and one port that the ranks of both dial."""

import dataclasses
from collections.abc import Callable, Collection, Mapping

from planner.inputs.cluster import Cluster
from serving.config import Settings
from serving.launch.host_pool import HostPool
from serving.launch.launcher import Launcher
from serving.launch.rank_listener import RankListener
from serving.launch.rank_process import OnExit, RankProcess
from serving.launch.shared_listener import SharedListener


class PoolStarter:
    """The starter of the ranks of one pool in the slots of a host pool."""

    def __init__(self, host_pool: HostPool, ranks: Collection[int]) -> None:
        self._host_pool = host_pool
        self._ranks = ranks

    def start(self, rank: int, front: str, on_exit: OnExit) -> RankProcess:
        """See `RankStarter.start`."""
        return self._host_pool.start(rank, front, on_exit)

    def orphans(self) -> Mapping[int, Callable[[OnExit], RankProcess]]:
        """See `RankStarter.orphans`."""
        return self._host_pool.orphans(self._ranks)


class PoolHosts:
    """The hosts of a server with pools, whose settings these are. `launcher` launches ranks on other hosts."""

    def __init__(self, settings: Settings, launcher: Launcher) -> None:
        assert launcher.host_pool is not None, "these ranks are processes of this machine"
        assert isinstance(launcher.listener, RankListener)
        self._settings = settings
        self._launcher = launcher
        self._host_pool = launcher.host_pool
        self._host_pool.own_streams = True  # steps of both pools have numbers of their own
        self._listener = SharedListener(launcher.listener, pools=2)
        self._cluster: Cluster | None = None

    def launcher(self, *_: object, ranks: Collection[int]) -> Launcher:
        """The launcher of the ranks of one pool; see `Launcher.of`."""
        return PoolLauncher(
            starter=PoolStarter(self._host_pool, ranks),
            listener=self._listener,
            host_pool=self._host_pool,
            hosts=self,
        )

    async def wait_for_ranks(self, address: str, log: Callable[[str], None]) -> Cluster:
        """Wait until there is a slot for every rank of all pools, once. Returns the cluster of all. Raises
        StartError."""
        if self._cluster is None:
            self._cluster = await self._launcher.wait_for_ranks(self._settings, address, log)
        assert self._cluster is not None
        return self._cluster

    async def close(self) -> None:
        """See `Launcher.close`."""
        await self._launcher.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolLauncher(Launcher):
    """How the ranks of one pool are started on hosts that it shares with the other pool."""

    hosts: PoolHosts

    async def wait_for_ranks(self, settings: Settings, address: str, log: Callable[[str], None]) -> Cluster:
        """See `PoolHosts.wait_for_ranks`."""
        return await self.hosts.wait_for_ranks(address, log)
