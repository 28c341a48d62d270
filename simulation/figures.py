"""The figures of many runs, and the record of the parts of a range of seeds that have run."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from simulation.run import Outcome

PACKAGES = ("planner", "serving", "simulation")
"""Their sources decide what a seed is."""


@dataclasses.dataclass
class Figures:
    """The figures of some runs: seeds, seconds they took, tokens of clients, faults that took effect by kind, and the
    seeds that broke a law."""

    seeds: int = 0
    seconds: float = 0.0
    virtual_seconds: float = 0.0
    tokens: int = 0
    faults: dict[str, int] = dataclasses.field(default_factory=dict[str, int])
    failing: list[dict[str, Any]] = dataclasses.field(default_factory=list[dict[str, Any]])

    def add(self, outcome: Outcome) -> None:
        """Count a run."""
        self.seeds += 1
        self.tokens += outcome.tokens
        self.virtual_seconds += outcome.virtual_s
        self._count(outcome.happened.items())
        if outcome.violations:
            scenario = outcome.scenario
            self.failing.append({"seed": scenario.seed, "mode": scenario.mode, "violations": list(outcome.violations)})

    def merge(self, other: Self) -> None:
        """Count the runs of other figures."""
        self.seeds += other.seeds
        self.seconds += other.seconds
        self.virtual_seconds += other.virtual_seconds
        self.tokens += other.tokens
        self._count(other.faults.items())
        self.failing += other.failing

    def _count(self, happened: Iterable[tuple[str, int]]) -> None:
        for kind, count in happened:
            self.faults[kind] = self.faults.get(kind, 0) + count

    @property
    def seeds_per_minute(self) -> float:
        """Seeds a minute of the time that they took."""
        return 60 * self.seeds / max(self.seconds, 1e-9)

    @property
    def faults_per_seed(self) -> float:
        """Faults a seed that took effect."""
        return sum(self.faults.values()) / max(1, self.seeds)

    def line(self) -> str:
        """The figures as a line of text."""
        return (
            f"{self.seeds} seeds in {self.seconds:.1f} s ({self.seeds_per_minute:.0f} a minute), "
            f"{self.faults_per_seed:.1f} faults a seed, {self.virtual_seconds:.0f} virtual seconds, "
            f"{self.tokens} tokens; {len(self.failing)} seeds break a law"
        )

    def json(self) -> dict[str, Any]:
        """The figures as JSON."""
        return {
            **dataclasses.asdict(self),
            "seeds_per_minute": self.seeds_per_minute,
            "faults_per_seed": self.faults_per_seed,
            "faults": dict(sorted(self.faults.items())),
        }


class Record:
    """A file with one line of JSON for each part of a range that has run to its end: the part, the modes, a digest of
    the code, and its figures. Parts that ran with other code do not count. Without a file nothing is kept."""

    def __init__(self, file: Path | None, modes: Sequence[str], code: str) -> None:
        self._file = file
        self._key = {"modes": list(modes), "code": code}
        self._done: dict[tuple[int, int], Figures] = {}
        for part in _recorded(file) if file is not None and file.exists() else ():
            if {name: part[name] for name in self._key} == self._key:
                self._done[part["first"], part["number"]] = Figures(**part["figures"])

    def figures_of(self, first: int, number: int) -> Figures | None:
        """The figures of the part with so many seeds from `first` on; None if it has not run."""
        return self._done.get((first, number))

    def add(self, first: int, number: int, figures: Figures) -> None:
        """Note that a part has run to its end."""
        self._done[first, number] = figures
        if self._file is not None:
            part = {"first": first, "number": number, **self._key, "figures": dataclasses.asdict(figures)}
            text = self._file.read_text() if self._file.exists() else ""
            ends = "\n" if text and not text.endswith("\n") else ""  # a line that was cut short
            with self._file.open("a") as out:
                out.write(f"{ends}{json.dumps(part)}\n")


def _recorded(file: Path) -> Iterator[dict[str, Any]]:
    """The parts in a file. A line that was cut short, since whoever wrote it was ended, counts as none: its part runs
    once more."""
    for line in file.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def code_digest(root: Path) -> str:
    """A digest of the sources in a checkout that decide what a seed is."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            digest.update(f"{file.relative_to(root)}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def parts(first: int, seeds: int, size: int) -> list[tuple[int, int]]:
    """A range of seeds in parts of at most `size`: the first seed and the number of each. Borders are multiples of
    `size`, so that ranges which overlap have parts in common."""
    borders = [first, *range(size * (first // size + 1), first + seeds, size), first + seeds]
    return [(start, end - start) for start, end in itertools.pairwise(borders) if end > start]


def total(figures: Iterable[Figures]) -> Figures:
    """All figures together."""
    whole = Figures()
    for each in figures:
        whole.merge(each)
    return whole
