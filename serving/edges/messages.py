"""The messages between an edge and the front, over a Unix socket in the run folder, or TCP from another host.

A frame is its length in four bytes, then a message in MessagePack. An edge says Hello and the front answers Welcome, or
Refused when they speak no version in common. Everything is stated by what an edge holds: which calls are open, and how
much of each stream has come. So an edge that reaches another front says the same again and goes on. Monotonic clocks of
two hosts have nothing in common: between hosts a moment is sent as the seconds until it or since it.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import msgspec

from planner.plan.pools import any_deployment
from serving import errors
from serving.core.call_records import decode, encode_call
from serving.edges.served_model import ServedModel
from serving.errors import Internal, MoejaxError
from serving.protocol.events import Event, EventKind, Severity
from serving.protocol.instructions import DeviceError, ErrorResponse, Instruction
from serving.protocol.prepared_model import ModelInfo
from serving.protocol.request import Call, Finished, Scored, Token
from serving.protocol.status import LossForecast, Status
from serving.protocol.tensors import TensorTarget, TensorUpdate
from serving.protocol.versions import EDGE, VersionRange

VERSION = EDGE.newest
"""The newest version of the messages that this code speaks."""
SOCKET = "edges"
"""Name of the front's socket in the run folder."""


class EdgeMessage(msgspec.Struct, array_like=True, tag=True, kw_only=True):
    """Base of all messages: in MessagePack an array that begins with the name of the class."""


# -- From an edge -----------------------------------------------------------------------------------------------


class Hello(EdgeMessage):
    """The first message of an edge: the newest and the oldest version that it speaks, its process id, and the code that
    it runs. An edge on another host has a `token`, the name of its `host`, and an `id` that is the same in each of its
    connections."""

    version: int
    pid: int
    oldest: int | None = None
    build: str = ""
    token: str = ""
    host: str = ""
    id: str = ""

    @property
    def versions(self) -> VersionRange:
        """The versions that the edge speaks; one that does not say its oldest speaks one alone."""
        return VersionRange(self.version if self.oldest is None else self.oldest, self.version)


class Serving(EdgeMessage):
    """The edge accepts connections of clients; `again`: it did so under an earlier front."""

    again: bool = False


class EdgeEnding(EdgeMessage):
    """The edge accepts no more connections, and ends when its calls have ended."""


class OpenCall(EdgeMessage):
    """A call is open at this edge. `call` is its record (`serving.core.call_records`)."""

    call: bytes


class CloseCall(EdgeMessage):
    """The client of an open call disconnected, or the call is complete."""

    call_id: str


class FailRequests(EdgeMessage):
    """Requests of an open call end with the error of another one of it."""

    call_id: str
    request_ids: tuple[str, ...]
    error: "Failed"


class Read(EdgeMessage):
    """Send the items of a request of an open call, which is accepted now if no front has accepted it yet. The edge has
    `tokens` tokens and `scored` scores of prompt tokens already, the first token of the weights `weights_version`."""

    stream: int
    call_id: str
    request_id: str
    tokens: int = 0
    scored: int = 0
    weights_version: str = ""


class Replay(EdgeMessage):
    """Send the items of a request of a recorded call from the beginning, with `follow` also those to come."""

    stream: int
    request_id: str
    follow: bool
    tokens: int = 0
    scored: int = 0


class Watch(EdgeMessage):
    """Send events with a sequence above `after`."""

    stream: int
    after: int


class Leave(EdgeMessage):
    """Nobody reads this stream any more."""

    stream: int


class Ask(EdgeMessage):
    """A question or an instruction: a name in METHODS, and its arguments."""

    number: int
    method: str
    arguments: msgspec.Raw


# -- From the front ---------------------------------------------------------------------------------------------


class Welcome(EdgeMessage):
    """The front serves this model. `resumable`: it records calls. `served` is for edges on other hosts."""

    version: int
    model: ModelInfo
    resumable: bool
    served: ServedModel | None = None


class Refused(EdgeMessage):
    """The edge cannot be served, and why."""

    text: str


class TokenItem(EdgeMessage):
    """A token. `first_step_at` is when the request left the queue, in seconds of the machine's monotonic clock; for an
    edge on another host `first_step_age_s` is how many seconds ago that was."""

    stream: int
    token: Token
    first_step_at: float | None = None
    first_step_age_s: float | None = None


class ScoredItem(EdgeMessage):
    """Scores of prompt tokens."""

    stream: int
    scored: Scored


class FinishedItem(EdgeMessage):
    """The end of a request."""

    stream: int
    finished: Finished


class EventItem(EdgeMessage):
    """An event, by the names of its fields."""

    stream: int
    event: dict[str, Any]


class Failed(EdgeMessage):
    """The error that ends a stream or answers an Ask: the name of its class, and its parts."""

    stream: int
    error: str
    text: str
    param: str | None = None
    retry_after_s: float | None = None


class Ended(EdgeMessage):
    """A stream has no more items."""

    stream: int


class Answered(EdgeMessage):
    """The answer to an Ask."""

    number: int
    value: msgspec.Raw


class Goodbye(EdgeMessage):
    """The server is shutting down: no other front of it follows."""


FromEdge = Hello | Serving | EdgeEnding | OpenCall | CloseCall | FailRequests | Read | Replay | Watch | Leave | Ask
FromFront = Welcome | Refused | TokenItem | ScoredItem | FinishedItem | EventItem | Failed | Ended | Answered | Goodbye

METHODS: dict[str, tuple[Any, Any]] = {
    "find_call": (tuple[str, str], bytes),
    "forget_call": (tuple[str], None),
    "abort": (tuple[str], bool),
    "status": (tuple[()], Status),
    "what_if": (tuple[()], tuple[LossForecast, ...]),
    "deployment": (tuple[()], str | None),
    "kill": (tuple[int, str, str], None),
    "apply": (tuple[Instruction], tuple[int, ...]),
    "begin_tensors": (tuple[TensorUpdate], TensorTarget),
    "apply_tensors": (tuple[TensorUpdate, str], tuple[int, ...]),
    "report": (tuple[DeviceError], ErrorResponse),
}
"""The methods of a backend that an edge forwards: the types of their arguments and of their answer."""
encode = msgspec.msgpack.Encoder().encode
decode_from_edge: Callable[[bytes], FromEdge] = msgspec.msgpack.Decoder(FromEdge).decode
decode_hello: Callable[[bytes], Hello] = msgspec.msgpack.Decoder(Hello).decode
"""Reads the first message of a peer that is not known yet, and nothing else."""
decode_from_front: Callable[[bytes], FromFront] = msgspec.msgpack.Decoder(FromFront).decode


def call_record(call: Call, since: float = 0.0) -> bytes:
    """The record of a call. `since` is subtracted from its deadlines: 0 on one machine, where edges and front share the
    monotonic clock; between hosts the time at which the record is sent, so that seconds left are sent."""
    return encode_call(call, -since)


def call_of_record(record: bytes, since: float = 0.0) -> Call:
    """The inverse of `call_record`; `since` is 0, or the time at which the record came."""
    call = decode(record, -since).call
    assert call is not None, "the record is that of a call"
    return call


def failed(stream: int, error: MoejaxError) -> Failed:
    """The message of an error."""
    return Failed(
        stream=stream,
        error=type(error).__name__,
        text=str(error),
        param=error.param,
        retry_after_s=error.retry_after_s,
    )


def error_of(message: Failed) -> MoejaxError:
    """The inverse of `failed`."""
    kind = getattr(errors, message.error, Internal)
    return kind(message.text, param=message.param, retry_after_s=message.retry_after_s)


def event_of(fields: dict[str, Any]) -> Event:
    """The event with these fields."""
    values = dict(fields)
    with contextlib.suppress(ValueError):  # one that only a newer front knows
        values["kind"] = EventKind(fields["kind"])
        values["severity"] = Severity(fields["severity"])
    return Event(**values)


def refusal(versions: VersionRange) -> str:
    """Why an edge that speaks these versions is not served by this front."""
    return (
        f"the edge speaks version {versions} of the messages between edges and front, and the front version {EDGE}. "
        "Start both from the same release."
    )


RECORDED: dict[str, tuple[Callable[[Any, float], Any], Callable[[Any, float], Any]]] = {
    "find_call": (call_record, call_of_record),
    "deployment": (
        lambda deployment, _: None if deployment is None else deployment.to_json(),
        lambda text, _: None if text is None else any_deployment(text),
    ),
}
"""Answers that travel in a form of their own: how it is made, and read, with `since` as in `call_record`."""
