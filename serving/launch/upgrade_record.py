"""The record of a server's upgrade, in a file of the run folder: the supervisor writes it, fronts read it."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, Self

from serving.launch.code import Code, known_fields
from serving.launch.weights_record import write_whole

UpgradeState = Literal["", "running", "rolling_back", "done", "rolled_back"]
UpgradeStage = Literal["", "front", "edges", "ranks"]
FILE = "upgrade.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpgradeRecord:
    """An upgrade, the `number`th of the server, from `origin` to `code`: processes that are started run `code`. While
    it is rolled back the two have changed places, and `cause` says why. Streams of an edge that is replaced have
    `drain_s` seconds to end. `done` and `rolled_back` count the upgrades that ended so."""

    code: Code
    origin: Code
    number: int = 0
    state: UpgradeState = ""
    stage: UpgradeStage = ""
    cause: str = ""
    drain_s: float = 30.0
    done: int = 0
    rolled_back: int = 0

    @property
    def active(self) -> bool:
        """Whether processes are still to be replaced."""
        return self.state in ("running", "rolling_back")

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """The inverse of `to_json`."""
        values: dict[str, Any] = dict(known_fields(cls, value))
        values |= {name: Code.from_json(value[name]) for name in ("code", "origin")}
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """As values of JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {"code": self.code.to_json(), "origin": self.origin.to_json()}

    def save(self, folder: Path) -> None:
        """Replace the file in the run folder. Raises OSError."""
        write_whole(folder / FILE, json.dumps(self.to_json()).encode())

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """The record in the run folder; None before the first upgrade."""
        try:
            return cls.from_json(json.loads((folder / FILE).read_text()))
        except FileNotFoundError:
            return None
