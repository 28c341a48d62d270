"""How a server's ranks are started: by the front itself, by hosts that join it, or by Ray."""

import asyncio
import dataclasses
import importlib
import os
import secrets
import time
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from planner.inputs.cluster import Cluster
from serving.auth.join_tokens import PREFIX, JoinTokens
from serving.auth.tls import ServerTls
from serving.config import Settings
from serving.errors import missing_extra
from serving.launch.coordinator import LOOPBACK
from serving.launch.host_pool import HostPool, TokenCheck
from serving.launch.rank_listener import RankListener
from serving.launch.rank_process import LocalStarter, RankStarter
from serving.launch.run_folder import RunFolder
from serving.launch.shared_listener import SharedListener
from serving.launch.supervised import SupervisedStarter
from serving.proto.moejax.v1 import link_pb2
from serving.protocol.prepared_model import PreparedModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launcher:
    """How this server's ranks are started. `starter` starts them, and they dial `listener`. `host_pool` is None where
    all ranks are processes of this machine. `cluster_module` asks a cluster manager to run the host agents, with the
    join token `secret`; None where they are started by hand."""

    starter: RankStarter
    listener: RankListener | SharedListener
    host_pool: HostPool | None = None
    secret: str = ""
    cluster_module: ModuleType | None = None
    started: list[Any] = dataclasses.field(default_factory=list)
    """Things that end with the server, each by its `stop`: host agents of `cluster_module`, or the starter."""

    @classmethod
    def of(
        cls,
        settings: Settings,
        model: PreparedModel,
        logs: Path,
        run: RunFolder | None = None,
        *,
        ranks: Collection[int] | None = None,
    ) -> Self:
        """The launcher that the settings ask for; `run` is the folder of a supervised front, `ranks` are those of one
        pool. Raises StartError or InvalidRequest when a file or package that they need is missing or wrong."""
        if settings.launcher == "local":
            return cls._local(settings, logs, run, ranks)
        cluster_module = _ray() if settings.launcher == "ray" else None
        secret = PREFIX + secrets.token_urlsafe(32) if cluster_module is not None else ""
        order = link_pb2.PrepareModel(
            model=_name_for_other_hosts(settings.model),
            data_type=settings.data_type,
            in_place=settings.in_place,
            dense=settings.dense,
            mtp=settings.speculate == "mtp",
            kv_cache_type=model.cache_format,
        )
        host_pool = HostPool(model, order, _token_check(settings, secret))
        listener = RankListener(
            address=settings.rank_listen,
            tls=ServerTls.of_ranks(settings),
            host_pool=host_pool,
            heartbeat_s=settings.heartbeat_s,
        )
        return cls(
            starter=host_pool, listener=listener, host_pool=host_pool, secret=secret, cluster_module=cluster_module
        )

    @classmethod
    def _local(cls, settings: Settings, logs: Path, run: RunFolder | None, ranks: Collection[int] | None) -> Self:
        threads, heartbeat_s = threads_of_a_rank(settings.ranks), settings.heartbeat_s
        if run is None:
            starter = LocalStarter(logs, threads)
            return cls(starter=starter, listener=RankListener(heartbeat_s=heartbeat_s), started=[starter])
        listener = RankListener(address=run.link, heartbeat_s=heartbeat_s)
        return cls(starter=SupervisedStarter(run.path, logs, threads, ranks), listener=listener)

    @property
    def host(self) -> str:
        """The address of this machine for services beside the front that ranks must reach."""
        return LOOPBACK if self.host_pool is None else self.listener.address.rpartition(":")[0]

    async def wait_for_ranks(self, settings: Settings, address: str, log: Callable[[str], None]) -> Cluster | None:
        """Wait until the host pool, which listens at `address`, has a slot for every rank. Returns the cluster that the
        slots make, or None where the front starts ranks itself. Raises StartError, saying who is missing."""
        if self.host_pool is None:
            return None
        began = time.monotonic()
        if self.cluster_module is not None:
            log(f"asking Ray at {settings.ray_address} for {settings.ranks} ranks")
            self.started.append(await asyncio.to_thread(self.cluster_module.start, settings, address, self.secret))
        timeout_s = settings.start_timeout_s - (time.monotonic() - began)
        return await self.host_pool.wait_for_slots(settings.ranks, address, timeout_s, log)

    async def close(self) -> None:
        """End what was started beside the ranks."""
        for each in self.started:
            await asyncio.to_thread(each.stop)


def threads_of_a_rank(ranks: int) -> int:
    """Threads that each of `ranks` ranks on this machine computes with."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def _token_check(settings: Settings, secret: str) -> TokenCheck:
    """A check that accepts `secret`, unless it is empty, and the tokens of the settings' file."""
    tokens = None if settings.rank_tokens is None else JoinTokens.open(Path(settings.rank_tokens))

    def check(shown: str, now: float) -> str | None:
        if secret and secrets.compare_digest(shown.encode(errors="replace"), secret.encode()):
            return None
        return tokens.rejection(shown, now) if tokens is not None else "this is no join token of this server"

    return check


def _name_for_other_hosts(model: str) -> str:
    """The model's name, or the absolute path of its folder: other hosts do not know this process's working folder."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def _ray() -> ModuleType:
    """The module that asks Ray for host agents. Raises StartError without Ray's package."""
    try:
        return importlib.import_module("serving.launch.ray")
    except ModuleNotFoundError as error:
        raise missing_extra("--launcher ray", error.name, "ray") from None
