"""What runs beside the steps for as long as the server does: the scrub of weights, the file of device errors, and the
journal's upkeep."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from serving.errors import MoejaxError
from serving.faults import DeviceError
from serving.ledger import Ledger

FOLLOW_S = 0.2
"""How often the file of device errors is looked at."""
TEND_S = 0.25
"""How often the journal is looked after."""
PAUSE_S = 0.0002
"""How long the steps have the interpreter to themselves after each request of a journal that is written anew."""


async def scrub(slots: Callable[[], int], inspect: Callable[[int], Awaitable[None]], period_s: float) -> None:
    """Inspect slot after slot, evenly, so that each is seen once in `period_s` seconds. `slots` is how many there are
    on a rank now, over all layers. Ends when cancelled."""
    number = 0
    while True:
        count = slots()
        await asyncio.sleep(period_s / max(count, 1))
        if count:
            number %= count
            await inspect(number)
            number += 1


async def follow_errors(path: Path, report: Callable[[DeviceError], object], say: Callable[[str], None]) -> None:
    """Report each line appended to a file from now on; a line that is none is said and passed over. The file may come
    later, be cut short or be replaced. Ends when cancelled."""
    at = path.stat().st_size if path.is_file() else 0
    rest = b""
    while True:
        await asyncio.sleep(FOLLOW_S)
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
                report(DeviceError.parse(line.decode(errors="replace")))
            except MoejaxError as error:
                say(str(error))


async def keep_journal(ledger: Ledger, tell: Callable[[str | None], None], sync_s: float) -> None:
    """Once in a while: forget what is over, write the journal anew where that is due, `tell` why nothing can be written
    or that it can again, and let the disk have the rest. Ends when cancelled."""
    synced, before = time.monotonic(), None
    while True:
        await asyncio.sleep(TEND_S)
        ledger.tend()
        if ledger.overgrown and (anew := ledger.rewrite()) is not None:
            await asyncio.to_thread(anew.write, PAUSE_S)
            ledger.rewritten(anew)
        if (ledger.trouble is None) != (before is None):
            tell(ledger.trouble)
        before = ledger.trouble
        if ledger.dirty and time.monotonic() - synced >= sync_s:
            await asyncio.to_thread(ledger.sync)
            synced = time.monotonic()
