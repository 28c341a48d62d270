"""Values to protobuf messages and back, for both ends of the wire: `x_message` makes, `x_value` reads.

An error travels as google.rpc.Status with ErrorInfo (the class's name, the field at fault) and RetryInfo.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from serving.errors import Cancelled, DeadlineExceeded, Internal, InvalidRequest, MoejaxError, QueueFull
from serving.generation import Chunk, Complete, Prompt
from serving.proto.moejax.v1 import inference_pb2, resilience_pb2
from serving.request import SamplingParams
from serving.status import Event, ModelInfo, RankStatus, Status
from serving.tokens import Message

DOMAIN = "moejax"
_DETAILS_KEY = "grpc-status-details-bin"  # where gRPC keeps a google.rpc.Status
_LONGEST_MESSAGE = 1000  # characters; a status travels in HTTP/2 headers, which are small
_REASONS = {"stop": inference_pb2.FINISH_REASON_STOP, "length": inference_pb2.FINISH_REASON_LENGTH}


def error_status(error: MoejaxError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """An error as a call's status code, message and trailing metadata."""
    info = error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=DOMAIN)
    if error.param is not None:
        info.metadata["param"] = error.param
    code, text = grpc.StatusCode[error.grpc_status], str(error)[:_LONGEST_MESSAGE]
    status = status_pb2.Status(code=code.value[0], message=text, details=[_packed(info)])
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        status.details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    return code, text, ((_DETAILS_KEY, status.SerializeToString()),)


def error_value(code: grpc.StatusCode, text: str, trailers: Iterable[tuple[str, str | bytes]] | None) -> MoejaxError:
    """The error a status stands for, also when it came from gRPC itself and has no details."""
    packed = next((v for k, v in trailers or () if k == _DETAILS_KEY and isinstance(v, bytes)), b"")
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in status_pb2.Status.FromString(packed).details:
        detail.Unpack(info)
        detail.Unpack(retry)
    kind = {k.__name__: k for k in error_classes()}.get(info.reason) if info.domain == DOMAIN else None
    if kind is not None:
        after = retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None
        return kind(text, param=info.metadata.get("param"), retry_after_s=after)
    if code is grpc.StatusCode.UNAVAILABLE:
        return Unreachable(text)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text:
        return InvalidRequest(text)
    known = {k.grpc_status: k for k in (Cancelled, DeadlineExceeded, InvalidRequest, QueueFull)}
    return known.get(code.name, Internal)(text or f"gRPC status {code.name}")


class Unreachable(MoejaxError):
    """No server answers at the address, or the connection broke. Only a client sees it."""

    grpc_status, http_status = "UNAVAILABLE", 503


def error_classes() -> Iterator[type[MoejaxError]]:
    """MoejaxError and everything below it."""
    queue: list[type[MoejaxError]] = [MoejaxError]
    while queue:
        kind = queue.pop()
        yield kind
        queue += kind.__subclasses__()


def request_message(prompt: Prompt, params: SamplingParams, request_id: str = "") -> inference_pb2.GenerateRequest:
    """A request as the client sends it. Raises InvalidRequest on a number that does not fit its field."""
    try:
        message = inference_pb2.GenerateRequest(request_id=request_id, sampling=_sampling_message(params))
        if isinstance(prompt, str):
            message.text = prompt
        elif prompt and isinstance(prompt[0], Message):
            turns = [inference_pb2.Message(role=m.role, content=[m.content]) for m in prompt]  # type: ignore[union-attr]
            message.chat.messages.extend(turns)
        else:
            message.token_ids.SetInParent()
            message.token_ids.ids.extend(prompt)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"the request cannot be sent: {error}") from error
    return message


def prompt_value(message: inference_pb2.GenerateRequest) -> Prompt:
    """The prompt of a request. Raises InvalidRequest when there is none."""
    match message.WhichOneof("prompt"):
        case "text":
            return message.text
        case "token_ids":
            return tuple(message.token_ids.ids)
        case "chat":
            return tuple(Message(m.role, "".join(m.content)) for m in message.chat.messages)
    raise InvalidRequest("the request has no prompt. Set text, token_ids or chat.", param="prompt")


def _sampling_message(params: SamplingParams) -> inference_pb2.SamplingParams:
    values = {f.name: getattr(params, f.name) for f in dataclasses.fields(params)}
    values["stop_token_ids"] = values.pop("stop_tokens")
    return inference_pb2.SamplingParams(**{k: v for k, v in values.items() if v is not None})


def sampling_value(message: inference_pb2.SamplingParams) -> SamplingParams:
    """Sampling parameters, with the default for every field that is not set."""
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "max_tokens")
    given: dict[str, Any] = {name: getattr(message, name) for name in names if message.HasField(name)}
    return SamplingParams(
        **given,
        stop=tuple(message.stop),
        stop_tokens=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
    )


def response_message(item: Chunk | Complete) -> inference_pb2.GenerateResponse:
    """A part of a stream."""
    if isinstance(item, Chunk):
        return inference_pb2.GenerateResponse(
            chunk=inference_pb2.Chunk(
                token_ids=item.token_ids,
                text=item.text,
                logprobs=item.logprobs,
                first_index=item.index,
                epoch=item.epoch,
            )
        )
    complete = inference_pb2.Complete(
        finish_reason=_REASONS[item.reason],
        usage=inference_pb2.Usage(prompt_tokens=item.prompt_tokens, completion_tokens=item.completion_tokens),
        epochs=item.epochs,
        request_id=item.request_id,
        seed=item.seed,
    )
    if isinstance(item.matched, str):
        complete.stop_string = item.matched
    elif item.matched is not None:
        complete.stop_token = item.matched
    return inference_pb2.GenerateResponse(complete=complete)


def response_value(message: inference_pb2.GenerateResponse) -> Chunk | Complete:
    """What `response_message` was made from."""
    if message.WhichOneof("event") == "chunk":
        chunk = message.chunk
        return Chunk(
            index=chunk.first_index,
            token_ids=tuple(chunk.token_ids),
            text=chunk.text,
            logprobs=tuple(chunk.logprobs),
            epoch=chunk.epoch,
        )
    complete = message.complete
    matched = complete.WhichOneof("matched")
    return Complete(
        request_id=complete.request_id,
        reason=next(r for r, v in _REASONS.items() if v == complete.finish_reason),
        prompt_tokens=complete.usage.prompt_tokens,
        completion_tokens=complete.usage.completion_tokens,
        epochs=tuple(complete.epochs),
        seed=complete.seed,
        matched=None if matched is None else getattr(complete, matched),
    )


def model_message(model: ModelInfo, has_chat_template: bool) -> inference_pb2.ModelInfo:
    """The model being served."""
    values = {k: v for k, v in dataclasses.asdict(model).items() if v is not None}
    return inference_pb2.ModelInfo(**values, has_chat_template=has_chat_template)


def model_value(message: inference_pb2.ModelInfo) -> ModelInfo:
    """What `model_message` was made from."""
    values = {f.name: getattr(message, f.name) for f in dataclasses.fields(ModelInfo)}
    values["stop_tokens"] = tuple(message.stop_tokens)
    values["bos_token"] = message.bos_token if message.HasField("bos_token") else None
    return ModelInfo(**values)


def status_message(status: Status) -> resilience_pb2.Status:
    """The whole server at one moment."""
    values = {f.name: getattr(status, f.name) for f in dataclasses.fields(status)}
    values["ranks"] = [_rank_message(r) for r in status.ranks]
    values["masked"] = [resilience_pb2.MaskedExpert(layer=l, expert=e) for l, e in status.masked]
    return resilience_pb2.Status(**values)


def _rank_message(rank: RankStatus) -> resilience_pb2.Rank:
    values = {f.name: getattr(rank, f.name) for f in dataclasses.fields(rank)}
    values["slots"] = [resilience_pb2.Slots(experts=row) for row in rank.slots]
    return resilience_pb2.Rank(**values)


def status_value(message: resilience_pb2.Status) -> Status:
    """What `status_message` was made from."""
    values = {f.name: getattr(message, f.name) for f in dataclasses.fields(Status)}
    values["ranks"] = tuple(_rank_value(r) for r in message.ranks)
    values["masked"] = tuple((m.layer, m.expert) for m in message.masked)
    values["axes"], values["lattice"] = (
        dict(sorted(message.axes.items())),
        dict(sorted(message.lattice.items())),
    )
    return Status(**values)


def _rank_value(message: resilience_pb2.Rank) -> RankStatus:
    values = {f.name: getattr(message, f.name) for f in dataclasses.fields(RankStatus)}
    values["pid"] = message.pid if message.HasField("pid") else None
    values["slots"] = tuple(tuple(s.experts) for s in message.slots)
    return RankStatus(**values)


def event_message(event: Event) -> resilience_pb2.Event:
    """Something that happened."""
    values = {f.name: getattr(event, f.name) for f in dataclasses.fields(event)}
    values["phases"] = [resilience_pb2.Phase(name=n, milliseconds=m) for n, m in event.phases.items()]
    return resilience_pb2.Event(**values)


def event_value(message: resilience_pb2.Event) -> Event:
    """What `event_message` was made from."""
    values = {f.name: getattr(message, f.name) for f in dataclasses.fields(Event)}
    values["rank"] = message.rank if message.HasField("rank") else None
    values["phases"] = {p.name: p.milliseconds for p in message.phases}
    return Event(**values)


def _packed(detail: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
