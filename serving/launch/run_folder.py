"""The folder that a supervisor and the fronts it starts share, readable for their owner only."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

ENV_RUN = "MOEJAX_LINK_RUN"
"""Environment variable that names a supervised front's folder."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The files that a supervisor and its fronts share."""

    path: Path
    pool: str = ""
    """The pool whose link and placement these are, where a server has several."""

    def of_pool(self, name: str) -> "RunFolder":
        """The same folder with the link and the placement of one pool."""
        return dataclasses.replace(self, pool=name)

    @classmethod
    def of_this_front(cls) -> "RunFolder | None":
        """The folder of this process, if it is a supervised front."""
        path = os.environ.get(ENV_RUN)
        return cls(Path(path)) if path else None

    @property
    def settings(self) -> Path:
        """The server's settings as TOML."""
        return self.path / "settings.toml"

    @property
    def journal(self) -> Path:
        """The folder of the journal, where the settings name no other."""
        return self.path / "journal"

    @property
    def link(self) -> str:
        """The address that ranks of this machine dial, the same for every front."""
        return f"unix:{self.path / f'link{self.pool}'}"

    @property
    def prepared(self) -> Path:
        """The prepared model of the first front, as JSON."""
        return self.path / "prepared.json"

    @property
    def buckets(self) -> Path:
        """The buckets that the first front chose, as JSON."""
        return self.path / "buckets.json"

    @property
    def placement(self) -> Path:
        """The base plan after experts were moved because of the load, as a plan file."""
        return self.path / f"placement{self.pool}.json"

    @property
    def metrics(self) -> Path:
        """The folder in which front and edges add up their metrics."""
        return self.path / "metrics"

    @property
    def canary(self) -> Path:
        """The answers that the canaries of an upgrade must give, as JSON."""
        return self.path / "canary.json"

    def note(self, what: str) -> None:
        """Note that the process which calls this is so far: a front that is "waiting" or "ready", or an edge that
        is "serving"."""
        (self.path / f"{what}-{os.getpid()}").touch()

    def has_noted(self, what: str, pid: int) -> bool:
        """Whether a process has noted that it is so far."""
        return (self.path / f"{what}-{pid}").exists()

    def first_to_note(self, what: str) -> bool:
        """Note something for all fronts that follow. Whether no front has noted it before."""
        try:
            (self.path / f"{what}.noted").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def forget(self, pid: int) -> None:
        """Drop the notes of a process that has ended: another one may get its number."""
        for note in self.path.glob(f"*-{pid}"):
            note.unlink(missing_ok=True)

    def next_front(self) -> int:
        """The number of the front in this process: 0 for the first, then one more for each."""
        file = self.path / "fronts"
        number = int(file.read_text()) if file.exists() else 0
        new = self.path / "fronts.new"
        new.write_text(str(number + 1))
        new.rename(file)
        return number

    @property
    def ports(self) -> dict[str, int]:
        """The ports of the last front that was ready, by the name of their setting."""
        try:
            return {name: int(port) for name, port in self._ready()["ports"].items()}
        except (OSError, ValueError, KeyError):
            return {}

    def announce(self, **ports: int) -> None:
        """Note that the front in this process is ready, on these ports."""
        self.note("ready")
        new = self.path / "ready.new"
        new.write_text(json.dumps({"pid": os.getpid(), "ports": ports}))
        new.rename(self.path / "ready.json")

    def was_ready(self, pid: int) -> bool:
        """True if the front with this pid has been ready."""
        try:
            return self._ready()["pid"] == pid
        except (OSError, ValueError, KeyError):
            return False

    def _ready(self) -> dict[str, Any]:
        return json.loads((self.path / "ready.json").read_text())
