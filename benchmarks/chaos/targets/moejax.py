"""moejax as `moejax serve` starts it."""

import importlib.metadata
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import httpx

from benchmarks.chaos.processes import descendants
from benchmarks.chaos.targets.target import Target
from benchmarks.launch import Launched
from benchmarks.streams import whole
from serving.api.client import Client
from serving.errors import MoejaxError
from serving.protocol.status import Status

_COORDINATOR = b"moejax.runtime.coordinator"


class Moejax(Target):
    """The default model on four ranks; other flags of `moejax serve` come last and win."""

    about = f"moejax {importlib.metadata.version('moejax')}"

    def __init__(self, server: Launched, ranks: int) -> None:
        self._server = server
        self._ranks = ranks
        self.url = f"http://{server.http}"
        self.model = str(httpx.get(f"{self.url}/v1/models").raise_for_status().json()["data"][0]["id"])
        self.setup = f"supervisor, front, standby front, coordinator, {ranks} ranks"

    @classmethod
    def start(cls, options: Sequence[str]) -> Self:
        """Start the server and wait until every single loss is prepared for."""
        model = _option(options, "--model", "smollm2-moe")
        ranks = int(_option(options, "--ranks", "4"))
        return cls(Launched(model, ranks, options=options), ranks)

    @property
    def selectors(self) -> Sequence[str]:
        """`rank` is the one with the most streams."""
        return ("rank", *(f"rank:{i}" for i in range(self._ranks)), "front", "coordinator")

    def process(self, selector: str) -> int:
        """From the server's status; the coordinator by its command."""
        if selector not in self.selectors:
            raise LookupError(f"{selector} is none of {', '.join(self.selectors)}")
        if selector == "coordinator":
            return _coordinator(self._server.session)
        status = self._status()
        if selector == "front":
            return status.front_pid
        serving = [rank for rank in status.ranks if rank.pid is not None and rank.state == "serving"]
        wanted = [rank for rank in serving if selector in ("rank", f"rank:{rank.id}")]
        if not wanted:
            raise LookupError(f"no rank that serves is {selector}; serving are {[rank.id for rank in serving]}")
        pid = max(wanted, key=lambda rank: rank.running).pid
        assert pid is not None
        return pid

    def whole(self) -> bool:
        """True if all ranks serve and every single loss is prepared for."""
        try:
            return whole(self._status())
        except MoejaxError:  # the front is being replaced
            return False

    @property
    def restarts(self) -> int:
        """Ranks and fronts are replaced; the server as a whole is never started again."""
        return 0

    def stop(self) -> None:
        """End the server as an operator does."""
        self._server.stop()

    def _status(self) -> Status:
        with Client(self._server.address) as client:
            return client.status()


def _option(options: Sequence[str], flag: str, default: str) -> str:
    """The value of a flag of `moejax serve`, its last one."""
    values = [value for name, value in itertools.pairwise(options) if name == flag]
    return values[-1] if values else default


def _coordinator(supervisor: int) -> int:
    for pid in descendants(supervisor):
        try:
            if _COORDINATOR in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        except OSError:  # it has ended
            continue
    raise LookupError(f"no descendant of the supervisor {supervisor} is the coordinator")
