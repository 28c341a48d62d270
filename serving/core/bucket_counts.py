"""Counts of step shapes, kept in a small file across restarts, and the buckets chosen from them (`--buckets auto`).

There is one file for each model, number of ranks and architecture, in the cache folder. The server reads it at the
start, and adds its counts every few minutes and at the end.
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

from planner.cost.buckets import BucketSize, StepCounts, StepDemand, buckets_to_serve, padding_share, read_counts
from planner.errors import InputError
from serving.config import Settings
from serving.core.step_stats import StepStats
from serving.launch.run_folder import RunFolder
from serving.observability.logs import SERVER
from serving.protocol.prepared_model import PreparedModel

SAVE_PERIOD_S = 180.0
"""Seconds between two writes of the counts."""
MIN_STEPS = 2000
"""Number of counted steps below which the default buckets stay."""
MIN_SAVING = 0.05
"""Share of the rows that other buckets must save to be worth a compilation."""
MAX_STEPS = 1_000_000
"""Number of steps beyond which all counts are scaled down, so that older steps count less."""


class BucketCounts:
    """The file with the counts of one model's steps."""

    def __init__(self, path: Path, about: Mapping[str, str | int]) -> None:
        self.path = path
        self._about = dict(about)
        self._lock = threading.Lock()

    @classmethod
    def for_server(cls, settings: Settings, model: PreparedModel) -> "BucketCounts | None":
        """The file of a server with these settings; None when the cache has no folder for counts."""
        if not model.steps:
            return None
        about = {"model": model.name, "content": model.content, "ranks": settings.ranks, "arch": settings.arch}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        return cls(Path(model.steps) / f"{model.name}-{digest}.json", about)

    def read(self) -> StepCounts:
        """The counts in the file; none when there is no file, or it cannot be read as counts."""
        if self.path.exists():
            try:
                return read_counts(str(self.path))
            except InputError as error:
                SERVER.warning("%s; a new file is begun", error)
        return StepCounts({}, about=self._about)

    def add(self, wanted: Mapping[BucketSize, StepDemand] | None = None, **sets: tuple[BucketSize, ...]) -> None:
        """Add steps to the file, and write which buckets are `served` or `chosen`. Safe from any thread. Raises
        OSError."""
        with self._lock:
            self._write(
                dataclasses.replace(self.read().merged(wanted or {}).scaled_to(MAX_STEPS), about=self._about, **sets)
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

    async def save(self, step_stats: StepStats, served: tuple[BucketSize, ...]) -> None:
        """Add the steps counted since the last call. If the file cannot be written, they are lost, with a warning."""
        taken = step_stats.take_demand()
        if not taken:
            return
        try:
            await asyncio.to_thread(self.add, taken, served=served)
        except OSError as error:
            SERVER.warning("counts of %d steps are lost: %s", sum(want.steps for want in taken.values()), error)

    async def save_periodically(self, step_stats: StepStats, served: tuple[BucketSize, ...]) -> None:
        """Save every SAVE_PERIOD_S seconds until cancelled."""
        while True:
            await asyncio.sleep(SAVE_PERIOD_S)
            await self.save(step_stats, served)


def resolve_buckets(
    settings: Settings, saved_counts: BucketCounts | None, log: Callable[[str], None], run: RunFolder | None
) -> Settings:
    """Settings whose buckets are decided: as given, or chosen from the saved counts. A front that takes over ranks uses
    the buckets of the front before it."""
    if settings.buckets:
        return settings
    if run is not None and run.buckets.exists():
        before = json.loads(run.buckets.read_text())
        return dataclasses.replace(settings, buckets=tuple(map(tuple, before)))
    counts, usual = saved_counts.read() if saved_counts is not None else StepCounts({}), Settings.buckets
    chosen = buckets_to_serve(counts, usual, steps=MIN_STEPS, saves=MIN_SAVING)
    log(_reason(counts, usual, chosen))
    if run is not None:
        run.buckets.write_text(json.dumps(chosen))
    if saved_counts is not None:
        try:
            saved_counts.add(chosen=chosen)
        except OSError as error:
            SERVER.warning("the chosen buckets are not written: %s", error)
    return dataclasses.replace(settings, buckets=chosen)


def _reason(counts: StepCounts, usual: tuple[BucketSize, ...], chosen: tuple[BucketSize, ...]) -> str:
    shapes = f"steps are compiled for {' '.join(f'{rows},{tiles}' for rows, tiles in chosen)}"
    if counts.steps < MIN_STEPS:
        return f"{shapes}: others are chosen when {MIN_STEPS} steps are counted, now {counts.steps}"
    now, before = (f"{padding_share(counts, each):.0%}" for each in (chosen, usual))
    return f"{shapes}: of {counts.steps} steps {now} would have been padding, {before} with the usual ones"
