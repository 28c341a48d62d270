"""Records of calls and of their answers in the journal: JSON, whose keys are those of moejax 0.1.0.

`clock_offset_s` is the wall clock less this process's monotonic clock, in seconds: a deadline is written as a moment of
the wall clock, which the next front and this one have in common.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from serving import errors
from serving.engine.poison import Incident
from serving.errors import Internal, InvalidRequest, MoejaxError
from serving.protocol.request import AnswerParsing, Call, Finished, Request, Scored, Token
from serving.protocol.sampling import ResolvedSampling, StructuredOutputs
from serving.protocol.weights import FIRST_WEIGHTS


class UnreadableCall(Exception):
    """The record of the call `call_id` has fields that this code does not know: newer code wrote it. `error` is for its
    client."""

    def __init__(self, call_id: str, names: Iterable[str]) -> None:
        self.error = InvalidRequest(
            f"the front does not know {', '.join(sorted(names))} yet: an edge that runs newer code sent the request. "
            "Upgrade the front, or leave these parameters out."
        )
        super().__init__(f"call {call_id}: {self.error}")
        self.call_id = call_id


StreamItem = Scored | Token | Finished | MoejaxError
"""One item in the stream of a request."""
_JOURNAL_KEYS: Mapping[str, str] = {"structured_outputs": "guide", "prompt_group": "family"}
"""Keys of a request's record that differ from the names of `Request`'s fields."""


def _encode(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def encode_call(call: Call, clock_offset_s: float) -> bytes:
    """The record of a call and its requests."""
    requests = [_request_json(request, clock_offset_s) for request in call.requests]
    return _encode({"call": dataclasses.asdict(call) | {"requests": requests}})


def encode_items(items: Iterable[tuple[str, StreamItem]], at: float | None = None) -> bytes:
    """The record of items, each with the id of its request. `at` is when items that end an answer were recorded, in
    seconds of the wall clock."""
    record: dict[str, Any] = {"told": [[request_id, *_item_json(item)] for request_id, item in items]}
    return _encode(record if at is None else record | {"at": at})


def encode_incidents(incidents: Iterable[Incident]) -> bytes:
    """The record of all incidents that no cleared request explains; it replaces earlier ones."""
    return _encode({"incidents": [[each.weight, dict(each.until), each.ranks] for each in incidents]})


def encode_forgotten(call_id: str) -> bytes:
    """The record that a call is forgotten."""
    return _encode({"forgotten": call_id})


def encode_compacted(size: int) -> bytes:
    """The record at the end of what a compaction wrote: the `size` bytes before it hold all calls known then."""
    return _encode({"compacted": size})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """A decoded record of the journal. Only the fields that it has are set: one, or two."""

    call: Call | None = None
    items: Sequence[tuple[str, StreamItem]] = ()
    """Items with the ids of their requests."""
    at: float | None = None
    """When the items that end an answer were recorded, in seconds of the wall clock."""
    incidents: tuple[Incident, ...] | None = None
    """All incidents that no cleared request explains, in place of earlier ones."""
    forgotten: str | None = None
    """The id of a call that is forgotten."""
    compacted: int | None = None
    """Bytes of what a compaction wrote, which stands before this record."""


def decode(record: bytes, clock_offset_s: float) -> Record:
    """Decode a record. Raises UnreadableCall for a call of newer code that needs more than this code knows."""
    value: Mapping[str, Any] = json.loads(record)
    if "forgotten" in value:
        return Record(forgotten=value["forgotten"])
    if "compacted" in value:
        return Record(compacted=value["compacted"])
    if (incidents := value.get("incidents")) is not None:
        return Record(incidents=tuple(Incident(weight, until, tuple(ranks)) for weight, until, ranks in incidents))
    call = None
    if "call" in value:
        fields: dict[str, Any] = dict(value["call"])
        if unknown := _unknown_fields(fields):
            raise UnreadableCall(fields["id"], unknown)
        fields["requests"] = tuple(_request_value(request, clock_offset_s) for request in fields["requests"])
        fields["stop"] = tuple(fields["stop"])
        call = Call(**fields)
    items = [(request_id, _item_value(kind, parts)) for request_id, kind, parts in value.get("told", ())]
    return Record(call=call, items=items, at=value.get("at"))


_KNOWN: Mapping[type, frozenset[str]] = {
    each: frozenset(field.name for field in dataclasses.fields(each))
    for each in (Call, Request, ResolvedSampling, StructuredOutputs, AnswerParsing)
}
"""The names of the fields of each part of a call's record."""


def _unknown_fields(call: Mapping[str, Any]) -> set[str]:
    """Names in the record of a call that no field has."""
    names = {key: name for name, key in _JOURNAL_KEYS.items()}
    unknown: set[str] = set(call) - _KNOWN[Call]
    for request in call["requests"]:
        unknown |= {str(names.get(key, key)) for key in request} - _KNOWN[Request] - _KNOWN[ResolvedSampling]
        unknown |= (request.get("guide") or {}).keys() - _KNOWN[StructuredOutputs]
        unknown |= (request.get("parsing") or {}).keys() - _KNOWN[AnswerParsing]
    return unknown


_ALWAYS = frozenset({"stop_tokens", "logit_bias", "structured_outputs", "deadline"})
"""Fields that are in each record, as readers of version 1 want them."""
_DEFAULTS: Mapping[str, Any] = {
    field.name: field.default
    for each in (Request, ResolvedSampling)
    for field in dataclasses.fields(each)
    if field.default is not dataclasses.MISSING and field.name not in _ALWAYS
}
"""Values that a record leaves out: so that older code can read it unless it needs what that code does not have."""


def _request_json(request: Request, clock_offset_s: float) -> dict[str, Any]:
    """A request's record: the fields of `request.sampling` stand beside those of the request."""
    values: dict[str, Any] = dataclasses.asdict(request)
    values |= values.pop("sampling")
    values["stop_tokens"] = sorted(values["stop_tokens"])
    values["deadline"] = None if request.deadline is None else request.deadline + clock_offset_s
    return {
        _JOURNAL_KEYS.get(name, name): value
        for name, value in values.items()
        if name not in _DEFAULTS or value != _DEFAULTS[name]
    }


def _request_value(value: Mapping[str, Any], clock_offset_s: float) -> Request:
    names = {key: name for name, key in _JOURNAL_KEYS.items()}
    fields = {names.get(key, key): each for key, each in value.items()}
    fields["prompt"] = tuple(fields["prompt"])
    fields["stop_tokens"] = frozenset(fields["stop_tokens"])
    fields["logit_bias"] = tuple((int(token), bias) for token, bias in fields["logit_bias"])
    constraint = fields["structured_outputs"]
    fields["structured_outputs"] = None if constraint is None else StructuredOutputs(**constraint)
    parsing = fields.get("parsing")
    fields["parsing"] = None if parsing is None else AnswerParsing(**parsing | {"tools": tuple(parsing["tools"])})
    fields["deadline"] = None if fields["deadline"] is None else fields["deadline"] - clock_offset_s
    own = {field.name for field in dataclasses.fields(Request)}
    sampling = ResolvedSampling(**{name: part for name, part in fields.items() if name not in own})
    return Request(**{name: part for name, part in fields.items() if name in own}, sampling=sampling)


def _item_json(item: StreamItem) -> tuple[str, list[Any]]:
    if isinstance(item, Token):
        fields = [item.index, item.id, item.logprob, item.epoch, item.degraded, item.top, item.cached_tokens]
        if item.weights_version != FIRST_WEIGHTS.label:
            return "token", [*fields, item.drafted, item.weights_version]
        return "token", [*fields, True] if item.drafted else fields
    if isinstance(item, Scored):
        return "scored", [item.position, item.logprobs, item.top]
    if isinstance(item, Finished):
        return "finished", [item.reason, item.cached_tokens]
    return "error", [type(item).__name__, str(item), item.param, item.retry_after_s]


def _item_value(kind: str, fields: list[Any]) -> StreamItem:
    if kind == "token":
        index, token, logprob, epoch, degraded, top, cached_tokens, *more = fields
        drafted, weights = (more[0], more[1]) if len(more) == 2 else (bool(more), FIRST_WEIGHTS.label)
        return Token(index, token, logprob, epoch, degraded, _top(top), cached_tokens, drafted, weights)
    if kind == "scored":
        return Scored(fields[0], tuple(fields[1]), tuple(map(_top, fields[2])))
    if kind == "finished":
        return Finished(*fields)
    name, text, param, retry_after_s = fields
    found = getattr(errors, name, Internal)
    return found(text, param=param, retry_after_s=retry_after_s)


def _top(value: Iterable[Any]) -> tuple[tuple[int, float], ...]:
    return tuple((token, logprob) for token, logprob in value)
