"""A slot of the host pool, and a rank that runs there: the front's side of what a host agent keeps."""

import asyncio
import contextlib
import secrets

from serving.launch.rank_process import HostPaths, OnExit
from serving.proto.moejax.v1 import link_pb2

FENCE_TIMEOUT_S = 0.3
"""Seconds that a host agent may take to report the end of a lost rank; then being cut off counts as the end."""
MAX_INCARNATION = 1 << 53
"""Above the number of incarnations that any front has started."""
UNKNOWN_HOST = "unknown"


class HostSlot:
    """Room for one rank at a time on a joined host. `host_paths` is None until the host has prepared the model;
    `refusal` is why the slot cannot be used, empty if it can."""

    def __init__(self, number: int, offer: link_pb2.Place, peer: str) -> None:
        self.number = number
        self.host = offer.host or UNKNOWN_HOST
        self.rack = offer.rack
        self.peer = peer
        self.orders: asyncio.Queue[link_pb2.PlaceOrder | None] = asyncio.Queue()
        """Orders for the agent; None ends the stream."""
        self.host_paths: HostPaths | None = None
        self.rank: RemoteRank | None = None
        self.orphan = offer.left if offer.left.token and offer.left.incarnation < MAX_INCARNATION else None
        """The rank that runs here since before this front was started."""
        self.condition: link_pb2.RankCondition | None = None
        """The last report of the agent on the process that runs here."""
        self.refusal = ""

    @property
    def is_free(self) -> bool:
        """True when a rank can be started here."""
        return self.host_paths is not None and self.rank is None

    def kill_orphan(self) -> None:
        """Order the end of the rank that an earlier front started here, if there is one."""
        if self.orphan is not None:
            order = link_pb2.SignalRank(incarnation=self.orphan.incarnation, name="SIGKILL")
            self.orders.put_nowait(link_pb2.PlaceOrder(signal=order))
            self.orphan = None


class RemoteRank:
    """One incarnation of a rank on a joined host, or one that waits for a slot; see `RankProcess`."""

    def __init__(self, rank: int, incarnation: int, on_exit: OnExit, token: str = "") -> None:
        self.rank = rank
        self.incarnation = incarnation
        self.token = token or secrets.token_hex(16)
        self.pid: int | None = None
        self.exit_code: int | None = None
        self.host_paths: HostPaths | None = None
        self.slot: HostSlot | None = None
        self._ended = asyncio.Event()
        self._on_exit = on_exit
        self._output = "it has not been started: no slot was free"

    @property
    def is_waiting(self) -> bool:
        """True while it still needs a slot."""
        return self.slot is None and not self._ended.is_set()

    def start_in(self, slot: HostSlot, *, own_stream: bool = False) -> None:
        """Order the start of its process in a free slot. With `own_stream` its host agent does not pass its stream
        on."""
        self.bind(slot)
        start = link_pb2.StartRank(
            incarnation=self.incarnation, rank=self.rank, token=self.token, own_stream=own_stream
        )
        slot.orders.put_nowait(link_pb2.PlaceOrder(start=start))

    def bind(self, slot: HostSlot) -> None:
        """Note that it runs in a slot."""
        self.slot, self.host_paths, slot.rank = slot, slot.host_paths, self
        self._output = f"it is on {slot.host}, whose host agent has its output"

    @property
    def state(self) -> str:
        """See `RankProcess.state`."""
        return "" if self._condition is None else self._condition.state

    def run_delay_s(self) -> float | None:
        """See `RankProcess.run_delay_s`."""
        known = self._condition
        return known.run_delay_s if known is not None and known.HasField("run_delay_s") else None

    @property
    def _condition(self) -> link_pb2.RankCondition | None:
        """The last report of the host agent on this process."""
        known = self.slot.condition if self.slot is not None else None
        return known if known is not None and known.incarnation == self.incarnation else None

    def signal(self, name: str) -> None:
        """See `RankProcess.signal`. A rank that waits for a slot has no process, and ends by any signal."""
        if self.slot is None:
            self._ended.set()
        elif not self._ended.is_set():
            order = link_pb2.SignalRank(incarnation=self.incarnation, name=name)
            self.slot.orders.put_nowait(link_pb2.PlaceOrder(signal=order))

    async def fenced(self) -> None:
        """See `RankProcess.fenced`, and `serving.launch.host_pool` for why the wait has a limit."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FENCE_TIMEOUT_S):
                await self._ended.wait()

    def last_output(self) -> str:
        """See `RankProcess.last_output`."""
        return self._output

    def end(self) -> None:
        """See `RankProcess.end`."""
        self.signal("SIGKILL")

    def mark_ended(self, how: str, output: str = "") -> None:
        """Note, and report, that its process has ended or cannot be reached any more."""
        if not self._ended.is_set():
            self._ended.set()
            self._output = output or self._output
            self._on_exit(f"{how}{f': {output}' if output else ''}")
