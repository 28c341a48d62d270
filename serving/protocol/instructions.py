"""Instructions of operators and reports of devices to a running server, as values."""

import dataclasses
import enum
import json
from collections.abc import Collection, Mapping
from typing import Any, Literal, Self

from serving.errors import InvalidRequest, NoCapacity, NotPermitted
from serving.protocol.weights import RUNNING, Running

Action = Literal["pause", "retry", "drain", "scale_down", "scale_up", "rebalance", "weights", "upgrade"]
ACTIONS: tuple[Action, ...] = ("pause", "retry", "drain", "scale_down", "scale_up", "rebalance", "weights", "upgrade")
OF_THE_WHOLE_SERVER: tuple[Action, ...] = ("pause", "retry", "rebalance", "weights", "upgrade")
"""Actions that name no rank."""
MAX_LABEL = 64
"""Most characters in the label of a version of the weights."""
LOOPBACK = ("127.", "::1", "localhost")


class ErrorResponse(enum.Enum):
    """The action that a device error leads to."""

    IGNORE = "ignored"
    RECOMPUTE = "recompute"
    """The requests of the rank are computed again, there or elsewhere."""
    DRAIN = "drain"
    """The rank hands over its requests; then its process is replaced."""
    RESTART = "restart"
    """The rank is killed at once and replaced."""
    ISOLATE = "isolate"
    """The rank is killed at once and stays out until an operator scales up."""


RESPONSE_BY_LEVEL = {
    1: ErrorResponse.IGNORE,
    2: ErrorResponse.RECOMPUTE,
    3: ErrorResponse.DRAIN,
    4: ErrorResponse.DRAIN,
    5: ErrorResponse.RESTART,
    6: ErrorResponse.ISOLATE,
}
"""Error levels as accelerator plugins grade them: 1 needs no handling, 2 the request restarted, 3 the work
restarted, 4 the device reset when it is free, 5 the device reset now, 6 the device isolated."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceError:
    """An error of a rank's device, as reported by its plugin. `level` is 1 to 6."""

    rank: int
    level: int
    code: str = ""
    message: str = ""

    @property
    def response(self) -> ErrorResponse:
        """The action for this level."""
        return RESPONSE_BY_LEVEL[self.level]

    def __str__(self) -> str:
        return f"device error L{self.level}" + "".join(f" {text}" for text in (self.code, self.message) if text)

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """From JSON: {"rank": 2, "level": "L5" or 5, "code": "", "message": ""}. Raises InvalidRequest."""
        fields = _fields(value, {"rank", "level", "code", "message"})
        level = fields.get("level")
        if isinstance(level, str) and level.upper().startswith("L") and level[1:].isdigit():
            level = int(level[1:])
        if type(level) is not int or level not in RESPONSE_BY_LEVEL:
            raise InvalidRequest(f"level is {level!r}; it must be L1 to L6.", param="level")
        rank = fields.get("rank")
        if type(rank) is not int or rank < 0:
            raise InvalidRequest(f"rank is {rank!r}; it must be the number of a rank.", param="rank")
        for name in ("code", "message"):
            if not isinstance(fields.get(name, ""), str):
                raise InvalidRequest(f"{name} is {fields[name]!r}; it must be text.", param=name)
        return cls(rank=rank, level=level, code=fields.get("code", "")[:100], message=fields.get("message", "")[:500])

    @classmethod
    def from_line(cls, line: str) -> Self:
        """From a line of a report file. Raises InvalidRequest."""
        try:
            return cls.from_json(json.loads(line))
        except json.JSONDecodeError as error:
            raise InvalidRequest(f"{line[:80]!r} is not JSON: {error}", param="report") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """A planned change. `ranks`, `host` and `to` (how many shall serve) exclude one another.

    `timeout_s` is how long requests of a leaving rank wait for room elsewhere before they are computed again. With
    weights: `model` is the folder or name of the new weights, `version` their label (their number unless given),
    `running` what open streams do, and `timeout_s` how long they may take to end with `finish`; those still open then
    go on with the new weights. With upgrade: `path` is a checkout and `python` an interpreter, of which one must be
    given, and `timeout_s` how long streams of an edge may take to end before they are resumed at its successor.
    """

    action: Action
    ranks: tuple[int, ...] = ()
    host: str = ""
    to: int | None = None
    replace: bool = False
    timeout_s: float = 30.0
    model: str = ""
    version: str = ""
    running: Running = "switch"
    path: str = ""
    python: str = ""

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise InvalidRequest(f"action is {self.action!r}; it must be one of {', '.join(ACTIONS)}.", param="action")
        if not 0 <= self.timeout_s <= 3600:
            raise InvalidRequest(f"timeout_s is {self.timeout_s}; it must be 0 to 3600.", param="timeout_s")
        given = [name for name in ("ranks", "host") if getattr(self, name)] + ["to"] * (self.to is not None)
        if len(given) > 1:
            raise InvalidRequest(f"{' and '.join(given)} exclude one another; give one.", param=given[1])
        if given and self.action in OF_THE_WHOLE_SERVER:
            raise InvalidRequest(f"{self.action} is about the whole server; leave out {given[0]}.", param=given[0])
        if self.to is not None and (self.action == "drain" or self.to < 1):
            raise InvalidRequest(f"to is {self.to}: it goes with scale_down and scale_up, from 1 on.", param="to")
        if self.replace and self.action != "drain":
            raise InvalidRequest(f"replace goes with drain, not with {self.action}.", param="replace")
        self._check_weights()
        self._check_upgrade()

    def _check_weights(self) -> None:
        if self.action != "weights":
            for name in ("model", "version"):
                if getattr(self, name):
                    raise InvalidRequest(f"{name} goes with weights, not with {self.action}.", param=name)
            return
        if not self.model:
            raise InvalidRequest("weights needs model: the folder of the new weights on the server.", param="model")
        if len(self.version) > MAX_LABEL or not (self.version.isascii() and self.version.isprintable()):
            text = (
                f"version is {self.version[:MAX_LABEL]!r}; it must be at most {MAX_LABEL} printable ASCII characters."
            )
            raise InvalidRequest(text, param="version")
        if self.running not in RUNNING:
            raise InvalidRequest(f"running is {self.running!r}; it must be {' or '.join(RUNNING)}.", param="running")

    def _check_upgrade(self) -> None:
        given = [name for name in ("path", "python") if getattr(self, name)]
        if self.action != "upgrade":
            if given:
                raise InvalidRequest(f"{given[0]} goes with upgrade, not with {self.action}.", param=given[0])
            return
        if not given:
            raise InvalidRequest("upgrade needs path, a checkout on the server, or python.", param="path")

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """From JSON. vLLM's names `fault_tolerance_instruction` and `fault_tolerance_timeout` are accepted too."""
        names = {"fault_tolerance_instruction": "action", "fault_tolerance_timeout": "timeout_s"}
        value = {names.get(k, k): v for k, v in value.items()} if isinstance(value, Mapping) else value
        fields = _fields(value, {f.name for f in dataclasses.fields(cls)})
        kinds: dict[str, Any] = {"action": str, "ranks": list, "host": str, "to": int, "replace": bool}
        kinds |= {"timeout_s": (int, float)}
        kinds |= dict.fromkeys(("model", "version", "running", "path", "python"), str)
        for name, kind in kinds.items():
            given = fields.get(name)
            wrong = not isinstance(given, kind) or (isinstance(given, bool) and kind is not bool)
            if name in fields and wrong:
                raise InvalidRequest(f"{name} is {given!r}, which is of the wrong type.", param=name)
        ranks = fields.pop("ranks", [])
        if any(type(rank) is not int for rank in ranks):
            raise InvalidRequest(f"ranks is {ranks!r}; it must be a list of numbers.", param="ranks")
        if "action" not in fields:
            raise InvalidRequest(f"action is missing; it must be one of {', '.join(ACTIONS)}.", param="action")
        return cls(ranks=tuple(ranks), **fields)

    def select_ranks(self, hosts: Mapping[int, str], serving: Collection[int]) -> tuple[int, ...]:
        """The ranks that a drain, scale_down or scale_up is about. `hosts` has the host of every rank.

        Scaling down takes the highest ranks, scaling up the lowest. Raises InvalidRequest when the instruction names
        no rank, and NoCapacity when no rank would be left to serve.
        """
        up = self.action == "scale_up"
        absent = sorted(set(hosts) - set(serving))
        if self.host:
            named = [rank for rank, host in hosts.items() if host == self.host]
            if not named:
                known = ", ".join(sorted(set(hosts.values())))
                raise InvalidRequest(f"there is no host {self.host!r}; hosts are {known}.", param="host")
        elif self.to is not None:
            if self.to > len(hosts):
                raise InvalidRequest(f"to is {self.to}; this server was started with {len(hosts)} ranks.", param="to")
            count = self.to - len(serving) if up else len(serving) - self.to
            named = absent[: max(count, 0)] if up else sorted(serving, reverse=True)[: max(count, 0)]
        else:
            named = list(self.ranks) or (absent if up else [])
        unknown = set(named) - set(hosts)
        if unknown:
            raise InvalidRequest(f"there is no rank {min(unknown)}; ranks are {sorted(hosts)}.", param="ranks")
        if not named and self.to is None and not up:
            raise InvalidRequest(f"{self.action} needs ranks or a host.", param="ranks")
        if not up and set(serving) <= set(named):
            raise NoCapacity(f"{self.action} of {sorted(named)} would leave no rank to serve; {sorted(serving)} serve.")
        return tuple(sorted(set(named) & set(absent if up else serving)))


def check_may_operate(*, chaos: bool, operable: bool, key: str, peer: str) -> None:
    """Raises NotPermitted unless the server lets this caller operate it.

    A caller with an API key was checked to be an admin before. Where no keys are needed, only callers on the server's
    own machine may operate it (`peer` is an address), and only with --operate or --chaos.
    """
    if key:
        return
    if not (chaos or operable):
        raise NotPermitted("this server does not let callers operate it. Start it with --operate.")
    if not peer.startswith(LOOPBACK):
        raise NotPermitted(f"only callers on the server's own machine may operate it; this one is {peer or 'unknown'}.")


def _fields(value: Any, known: Collection[str]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"the body must be a JSON object with some of {', '.join(sorted(known))}.")
    for name in value:
        if name not in known:
            raise InvalidRequest(f"unknown field {name!r}; known are {', '.join(sorted(known))}.", param=str(name)[:40])
    return dict(value)
