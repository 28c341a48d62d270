"""Who starts the ranks of a server: itself, hosts that join it, or Ray."""

import asyncio
import dataclasses
import importlib
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from planner.cluster import Cluster
from serving.config import Settings
from serving.coordination import LOOPBACK
from serving.errors import StartError
from serving.join_tokens import PREFIX, JoinTokens
from serving.places import Places
from serving.prepared import Prepared
from serving.proto.moejax.v1 import link_pb2
from serving.rank_listener import RankListener
from serving.rank_process import Children, Launcher
from serving.run_folder import RunFolder
from serving.supervised import Supervised
from serving.tls import ServerTls


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crew:
    """`launcher` starts ranks, which dial `listener`. `places` is None where all are children of this process; `engine`
    is what was asked to have ranks started elsewhere."""

    launcher: Launcher
    listener: RankListener
    places: Places | None = None
    secret: str = ""
    engine: ModuleType | None = None
    started: list[Any] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, settings: Settings, model: Prepared, logs: Path, run: RunFolder | None = None) -> Self:
        """As the settings want it; `run` is the folder of a supervised front. Raises StartError or InvalidRequest when
        what they name is not there or wrong."""
        if settings.launcher == "local":
            threads = threads_of_a_rank(settings.ranks)
            if run is None:
                return cls(launcher=Children(logs, threads), listener=RankListener())
            return cls(launcher=Supervised(run.path, logs, threads), listener=RankListener(address=run.link))
        engine = _ray() if settings.launcher == "ray" else None
        tokens = None if settings.rank_tokens is None else JoinTokens.open(Path(settings.rank_tokens))
        secret = PREFIX + secrets.token_urlsafe(32) if engine is not None else ""

        def why_not(shown: str, now: float) -> str | None:
            if secret and secrets.compare_digest(shown.encode(errors="replace"), secret.encode()):
                return None
            return tokens.why_not(shown, now) if tokens is not None else "this is no join token of this server"

        order = link_pb2.PrepareModel(
            model=_as_elsewhere(settings.model),
            data_type=settings.data_type,
            in_place=settings.in_place,
            dense=settings.dense,
        )
        places = Places(model, order, why_not)
        listener = RankListener(address=settings.rank_listen, tls=ServerTls.of_ranks(settings), places=places)
        return cls(launcher=places, listener=listener, places=places, secret=secret, engine=engine)

    @property
    def host(self) -> str:
        """The address of this machine for what ranks must reach beside their front."""
        return LOOPBACK if self.places is None else self.listener.address.rpartition(":")[0]

    async def gather(self, settings: Settings, address: str, say: Callable[[str], None]) -> Cluster | None:
        """Have ranks dial in at `address` until all are there; the cluster they make. None where the front starts them
        itself. Raises StartError, saying who is missing."""
        if self.places is None:
            return None
        began = time.monotonic()
        if self.engine is not None:
            say(f"asking Ray at {settings.ray_address} for {settings.ranks} ranks")
            self.started.append(await asyncio.to_thread(self.engine.start, settings, address, self.secret))
        left = settings.start_timeout_s - (time.monotonic() - began)
        return await self.places.gather(settings.ranks, address, left, say)

    async def close(self) -> None:
        """End what was started elsewhere."""
        for each in self.started:
            await asyncio.to_thread(each.stop)


def threads_of_a_rank(ranks: int) -> int:
    """Threads that each of the ranks of this machine computes with."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def _as_elsewhere(model: str) -> str:
    """A model's name, or its folder as an absolute path: another host has no idea of this process's own folder."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def _ray() -> ModuleType:
    """The module that knows Ray. Raises StartError without its package."""
    try:
        return importlib.import_module("serving.launch_ray")
    except ModuleNotFoundError as error:
        raise StartError(f"--launcher ray needs {error.name}: pip install 'moejax[ray]'.") from None
