"""Tasks that run beside the steps while the server does: the scrub of weights, the file of device errors, and the
maintenance of the journal."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from serving.core.engine_shell import EngineShell
from serving.core.request_log import RequestLog
from serving.errors import MoejaxError
from serving.protocol import clock
from serving.protocol.events import EventKind
from serving.protocol.instructions import DeviceError

DEVICE_ERRORS_POLL_S = 0.2
"""Seconds between two reads of the file of device errors."""
JOURNAL_POLL_S = 0.25
"""Seconds between two rounds of journal maintenance."""
COMPACTION_PAUSE_S = 0.0002
"""Seconds of pause after each record of a compaction, in which steps have the interpreter to themselves."""


class Background:
    """The tasks beside the steps of one server, until its loop ends them. `report` takes errors of its devices."""

    def __init__(self, engine: EngineShell, report: Callable[[DeviceError], object]) -> None:
        self.tasks: list[asyncio.Task[None]] = []
        self._engine = engine
        self._report = report

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine beside the steps."""
        self.tasks.append(asyncio.create_task(work))

    def start(self, *, keeps_log: bool) -> None:
        """Begin the tasks that the settings ask for; the maintenance of the journal only with `keeps_log`."""
        engine, failover, settings = self._engine, self._engine.failover, self._engine.settings
        if engine.request_log.enabled and keeps_log:
            self.begin(maintain_journal(engine.request_log, self._on_journal_change, settings.journal_sync_s))
        if settings.scrub_s:
            self.begin(scrub_weights(self._slots_per_rank, engine.maintenance.repair.inspect_next, settings.scrub_s))
        if settings.rebalance == "auto":
            self.begin(engine.rebalancing.watch(settings.rebalance_bound, settings.rebalance_interval_s))
        if settings.device_errors:
            path = Path(settings.device_errors)
            self.begin(follow_device_errors(path, self._report, self._on_unreadable_device_error))
        if settings.parity:
            self.begin(failover.parity.maintain(lambda: None if failover.membership.losses else failover.settled_plan))

    def _slots_per_rank(self) -> int:
        plan = self._engine.failover.plan
        return plan.moe_layers * plan.slots_per_rank if plan is not None else 0

    def _on_unreadable_device_error(self, text: str) -> None:
        engine = self._engine
        engine.events.emit(EventKind.DEVICE_ERROR, engine.failover.epoch, message=f"not understood: {text}")

    def _on_journal_change(self, write_error: str | None) -> None:
        engine = self._engine
        kind = EventKind.JOURNAL_BACK if write_error is None else EventKind.JOURNAL_FAILED
        engine.events.emit(kind, engine.failover.epoch, cause=write_error or "")


async def scrub_weights(slots: Callable[[], int], inspect: Callable[[int], Awaitable[None]], period_s: float) -> None:
    """Inspect one slot after the other, evenly, each once in `period_s` seconds, until cancelled. `slots` gives the
    current number of slots of a rank, over all layers."""
    number = 0
    while True:
        count = slots()
        await asyncio.sleep(period_s / max(count, 1))
        if count:
            number %= count
            await inspect(number)
            number += 1


async def follow_device_errors(
    path: Path, report: Callable[[DeviceError], object], on_unreadable: Callable[[str], None]
) -> None:
    """Report each device error that is appended to a file, until cancelled. `on_unreadable` gets the message about a
    line that is not one. The file may appear later, be truncated or be replaced."""
    at = path.stat().st_size if path.is_file() else 0
    rest = b""
    while True:
        await asyncio.sleep(DEVICE_ERRORS_POLL_S)
        try:
            size = path.stat().st_size
            if size < at:
                at, rest = 0, b""
            if size == at:
                continue
            with path.open("rb") as file:
                file.seek(at)
                read = file.read(size - at)
        except OSError:
            at, rest = 0, b""
            continue
        at += len(read)
        *lines, rest = (rest + read).split(b"\n")
        for line in filter(bytes.strip, lines):
            try:
                report(DeviceError.from_line(line.decode(errors="replace")))
            except MoejaxError as error:
                on_unreadable(str(error))


async def maintain_journal(request_log: RequestLog, on_change: Callable[[str | None], None], sync_s: float) -> None:
    """Maintain the journal until cancelled: forget expired calls, compact it when most of it is stale, sync it to disk
    every `sync_s` seconds. `on_change` gets the reason when it cannot be written any more, None when it can again."""
    synced, before = clock.now(), None
    while True:
        await asyncio.sleep(JOURNAL_POLL_S)
        request_log.forget_expired()
        if request_log.needs_compaction and (compaction := request_log.begin_compaction()) is not None:
            await asyncio.to_thread(compaction.write, COMPACTION_PAUSE_S)
            request_log.finish_compaction(compaction)
        if (request_log.write_error is None) != (before is None):
            on_change(request_log.write_error)
        before = request_log.write_error
        if request_log.dirty and clock.now() - synced >= sync_s:
            await asyncio.to_thread(request_log.sync)
            synced = clock.now()
