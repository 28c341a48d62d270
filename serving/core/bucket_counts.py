"""What steps wanted, kept across restarts in a small file, and the buckets that are chosen of it (`--buckets auto`).

One file for each model, number of ranks and architecture, in the cache's folder: traffic of another kind wants other
buckets. It is read at the start, and written every few minutes and at the end, beside the steps.
"""

import asyncio
import dataclasses
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from planner.buckets import Bucket, StepCounts, Want, padding, read_counts, settle
from planner.errors import InputError
from serving.config import Settings
from serving.logs import SERVER
from serving.prepared import Prepared
from serving.run_folder import RunFolder
from serving.tally import Tally

KEEP_S = 180.0
"""How often counts are written."""
ENOUGH_STEPS = 2000
"""Steps below which nothing is chosen of them."""
SAVES = 0.05
"""Share of the rows that other buckets must save to be worth compiling."""
MOST_STEPS = 1_000_000
"""Older steps fade beyond so many."""


class StepBook:
    """The counts of one model's steps in a file."""

    def __init__(self, path: Path, about: Mapping[str, str | int]) -> None:
        self.path = path
        self._about = dict(about)
        self._lock = threading.Lock()

    @classmethod
    def of(cls, settings: Settings, model: Prepared) -> "StepBook | None":
        """Of a server like this one; None when the cache has no folder for it."""
        if not model.steps:
            return None
        about = {"model": model.name, "content": model.content, "ranks": settings.ranks, "arch": settings.arch}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        return cls(Path(model.steps) / f"{model.name}-{digest}.json", about)

    def read(self) -> StepCounts:
        """What there is; nothing when there is no file, or another thing in it."""
        if self.path.exists():
            try:
                return read_counts(str(self.path))
            except InputError as error:
                SERVER.warning("%s; it is begun anew", error)
        return StepCounts({}, about=self._about)

    def add(self, wanted: Mapping[Bucket, Want] | None = None, **sets: tuple[Bucket, ...]) -> None:
        """Add steps to those in the file, and note what is `served` or `chosen`. From any thread. Raises OSError."""
        with self._lock:
            self._write(
                dataclasses.replace(self.read().plus(wanted or {}).faded(MOST_STEPS), about=self._about, **sets)
            )

    def _write(self, counts: StepCounts) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(prefix=f"{self.path.name}.", suffix=".part", dir=self.path.parent)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(counts.to_json() + "\n")
            Path(part).rename(self.path)
        except OSError:
            Path(part).unlink(missing_ok=True)
            raise

    async def save(self, tally: Tally, served: tuple[Bucket, ...]) -> None:
        """Add what has been counted since the last time. What cannot be written is told and lost."""
        taken = tally.take_wanted()
        if not taken:
            return
        try:
            await asyncio.to_thread(self.add, taken, served=served)
        except OSError as error:
            SERVER.warning("counts of %d steps are lost: %s", sum(want.steps for want in taken.values()), error)

    async def keep(self, tally: Tally, served: tuple[Bucket, ...]) -> None:
        """Save now and then. Ends when cancelled."""
        while True:
            await asyncio.sleep(KEEP_S)
            await self.save(tally, served)


def with_buckets(
    settings: Settings, book: StepBook | None, say: Callable[[str], None], run: RunFolder | None
) -> Settings:
    """The settings with buckets: their own, or chosen of what the book says. A front that takes over ranks has those
    of the front before it."""
    if settings.buckets:
        return settings
    if run is not None and run.buckets.exists():
        before = json.loads(run.buckets.read_text())
        return dataclasses.replace(settings, buckets=tuple(map(tuple, before)))
    counts, usual = book.read() if book is not None else StepCounts({}), Settings.buckets
    chosen = settle(counts, usual, steps=ENOUGH_STEPS, saves=SAVES)
    say(_reason(counts, usual, chosen))
    if run is not None:
        run.buckets.write_text(json.dumps(chosen))
    if book is not None:
        try:
            book.add(chosen=chosen)
        except OSError as error:
            SERVER.warning("which buckets were chosen is not noted: %s", error)
    return dataclasses.replace(settings, buckets=chosen)


def _reason(counts: StepCounts, usual: tuple[Bucket, ...], chosen: tuple[Bucket, ...]) -> str:
    shapes = f"steps are compiled for {' '.join(f'{rows},{tiles}' for rows, tiles in chosen)}"
    if counts.steps < ENOUGH_STEPS:
        return f"{shapes}: others are chosen when {ENOUGH_STEPS} steps are counted, now {counts.steps}"
    now, before = (f"{padding(counts, each):.0%}" for each in (chosen, usual))
    return f"{shapes}: of {counts.steps} steps {now} would have been padding, {before} with the usual ones"
