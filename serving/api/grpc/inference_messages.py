"""Values to protobuf messages and back, for both ends of the wire: `x_message` makes, `x_value` reads.

An error travels as google.rpc.Status with ErrorInfo (the class's name, the field at fault) and RetryInfo.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from serving.errors import Cancelled, DeadlineExceeded, Internal, InvalidRequest, MoejaxError, QueueFull
from serving.faults import Instruction
from serving.generation import Chunk, Complete, Conversation, Item, Prompt, PromptScores
from serving.proto.moejax.v1 import inference_pb2, resilience_pb2
from serving.request import Guide, SamplingParams, Top
from serving.status import Event, LossCost, ModelInfo, Prospect, RankStatus, Status
from serving.tokens import Message
from serving.tools import ToolCall, read_choice, read_tools

DOMAIN = "moejax"
_DETAILS_KEY = "grpc-status-details-bin"  # where gRPC keeps a google.rpc.Status
_LONGEST_MESSAGE = 1000  # characters; a status travels in HTTP/2 headers, which are small
_GUIDES: Mapping[Any, str] = {"json": "json_schema", "regex": "regex", "lark": "grammar", "choice": "choice"}
_REASONS = {
    "stop": inference_pb2.FINISH_REASON_STOP,
    "length": inference_pb2.FINISH_REASON_LENGTH,
    "tool_calls": inference_pb2.FINISH_REASON_TOOL_CALLS,
}


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
        elif isinstance(prompt, Conversation):
            message.chat.messages.extend(map(_turn_message, prompt.messages))
            message.chat.tools.extend(json.dumps(tool) for tool in prompt.tools)
            message.chat.template_variables = json.dumps(prompt.variables) if prompt.variables else ""
        elif prompt and isinstance(prompt[0], Message):
            turns = [inference_pb2.Message(role=m.role, content=[m.content]) for m in prompt]  # type: ignore[union-attr]
            message.chat.messages.extend(turns)
        else:
            message.token_ids.SetInParent()
            message.token_ids.ids.extend(prompt)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"the request cannot be sent: {error}") from error
    return message


def _turn_message(turn: Mapping[str, Any]) -> inference_pb2.Message:
    calls = [
        inference_pb2.ToolCall(
            id=call.get("id", ""),
            name=call["function"]["name"],
            arguments=json.dumps(call["function"].get("arguments", {})),
        )
        for call in turn.get("tool_calls", ())
    ]
    more = {name: turn[name] for name in ("name", "tool_call_id") if turn.get(name)}
    return inference_pb2.Message(role=turn["role"], content=[turn.get("content", "")], tool_calls=calls, **more)


def _turn_value(message: inference_pb2.Message) -> Mapping[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": "".join(message.content)}
    if message.tool_calls:
        turn["tool_calls"] = [_past_call(call) for call in message.tool_calls]
    return turn | {name: text for name in ("name", "tool_call_id") if (text := getattr(message, name))}


def _past_call(call: inference_pb2.ToolCall) -> Mapping[str, Any]:
    value = {"type": "function", "function": {"name": call.name, "arguments": _json(call.arguments, "arguments")}}
    return {"id": call.id, **value} if call.id else value


def _json(text: str, param: str) -> Any:
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        raise InvalidRequest(f"{param} is no JSON.", param=param) from None


def tool_guide(message: inference_pb2.GenerateRequest) -> Guide | None:
    """What `tool_choice` asks of the answer. Raises InvalidRequest, also when another constraint is asked for too."""
    guide = _choice(message.chat)[1] if message.WhichOneof("prompt") == "chat" else None
    if guide is not None and message.sampling.WhichOneof("guide") is not None:
        raise InvalidRequest("tool_choice and another constraint exclude each other.", param="tool_choice")
    return guide


def _choice(chat: inference_pb2.Chat) -> tuple[Sequence[Mapping[str, Any]], Guide | None]:
    named = chat.tool_choice not in ("", "auto", "none", "required")
    value = {"function": {"name": chat.tool_choice}} if named else chat.tool_choice or None
    return read_choice(value, _tools(chat.tools))


def prompt_value(message: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest) -> Prompt:
    """The prompt of a request. Raises InvalidRequest when there is none."""
    match message.WhichOneof("prompt"):
        case "text":
            return message.text
        case "token_ids":
            return tuple(message.token_ids.ids)  # type: ignore[union-attr]
        case "chat":
            variables = _json(message.chat.template_variables, "template_variables")
            if not isinstance(variables, dict):
                raise InvalidRequest("template_variables must be a JSON object.", param="template_variables")
            messages = tuple(map(_turn_value, message.chat.messages))
            return Conversation(messages=messages, tools=tuple(_choice(message.chat)[0]), variables=variables)
    raise InvalidRequest("the request has no prompt. Set text, token_ids or chat.", param="prompt")


def _tools(texts: Sequence[str]) -> tuple[Mapping[str, Any], ...]:
    try:
        return read_tools([json.loads(text) for text in texts])
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"a tool is no JSON: {error}", param="tools") from None


def _sampling_message(params: SamplingParams) -> inference_pb2.SamplingParams:
    values = {f.name: getattr(params, f.name) for f in dataclasses.fields(params)}
    values["stop_token_ids"] = values.pop("stop_tokens")
    values["logit_bias"] = dict(values["logit_bias"])
    guide = values.pop("guide")
    if guide is not None:
        texts = guide.text if guide.kind != "choice" else inference_pb2.Choices(texts=json.loads(guide.text))
        values[_GUIDES[guide.kind]] = texts
    return inference_pb2.SamplingParams(**{k: v for k, v in values.items() if v is not None})


def sampling_value(message: inference_pb2.SamplingParams) -> SamplingParams:
    """Sampling parameters, with the default for every field that is not set."""
    maybe = ("temperature", "top_k", "top_p", "min_p", "seed", "max_tokens", "n", "repetition_penalty")
    plain = ("ignore_eos", "min_tokens", "frequency_penalty", "presence_penalty", "top_logprobs", "priority")
    given: dict[str, Any] = {
        name: getattr(message, name) for name in (*maybe, "prompt_logprobs") if message.HasField(name)
    }
    return SamplingParams(
        **given,
        **{name: getattr(message, name) for name in plain},
        stop=tuple(message.stop),
        stop_tokens=tuple(message.stop_token_ids),
        logit_bias=tuple(sorted(message.logit_bias.items())),
        guide=_guide_value(message),
    )


def _guide_value(message: inference_pb2.SamplingParams) -> Guide | None:
    match message.WhichOneof("guide"):
        case None:
            return None
        case "choice":
            if not message.choice.texts:
                raise InvalidRequest("choice has no texts. Give at least one.", param="choice")
            return Guide("choice", json.dumps(list(message.choice.texts)))
        case field:
            kind = next(kind for kind, name in _GUIDES.items() if name == field)
            return Guide(kind, getattr(message, field))


def response_message(item: Item) -> inference_pb2.GenerateResponse:
    """A part of a stream."""
    if isinstance(item, PromptScores):
        scores = inference_pb2.PromptScores(
            position=item.position, token_ids=item.token_ids, logprobs=item.logprobs, top=_top_messages(item.top)
        )
        return inference_pb2.GenerateResponse(prompt_scores=scores, choice=item.choice)
    if isinstance(item, Chunk):
        chunk = inference_pb2.Chunk(
            token_ids=item.token_ids,
            text=item.text,
            logprobs=item.logprobs,
            first_index=item.index,
            epoch=item.epoch,
            top=_top_messages(item.top),
            tool_calls=[inference_pb2.ToolCall(name=call.name, arguments=call.arguments) for call in item.calls],
        )
        return inference_pb2.GenerateResponse(chunk=chunk, choice=item.choice)
    complete = inference_pb2.Complete(
        finish_reason=_REASONS[item.reason],
        usage=inference_pb2.Usage(
            prompt_tokens=item.prompt_tokens,
            completion_tokens=item.completion_tokens,
            cached_tokens=item.cached_tokens,
        ),
        epochs=item.epochs,
        request_id=item.request_id,
        seed=item.seed,
        degraded=item.degraded,
    )
    if isinstance(item.matched, str):
        complete.stop_string = item.matched
    elif item.matched is not None:
        complete.stop_token = item.matched
    return inference_pb2.GenerateResponse(complete=complete, choice=item.choice)


def _top_messages(top: Sequence[Top]) -> list[inference_pb2.Top]:
    return [inference_pb2.Top(token_ids=[t for t, _ in each], logprobs=[p for _, p in each]) for each in top]


def _top_values(messages: Sequence[inference_pb2.Top]) -> tuple[Top, ...]:
    return tuple(tuple(zip(each.token_ids, each.logprobs, strict=True)) for each in messages)


def response_value(message: inference_pb2.GenerateResponse) -> Item:
    """What `response_message` was made from."""
    event = message.WhichOneof("event")
    if event == "prompt_scores":
        scores = message.prompt_scores
        return PromptScores(
            position=scores.position,
            token_ids=tuple(scores.token_ids),
            logprobs=tuple(scores.logprobs),
            top=_top_values(scores.top),
            choice=message.choice,
        )
    if event == "chunk":
        chunk = message.chunk
        return Chunk(
            index=chunk.first_index,
            token_ids=tuple(chunk.token_ids),
            text=chunk.text,
            logprobs=tuple(chunk.logprobs),
            epoch=chunk.epoch,
            top=_top_values(chunk.top),
            choice=message.choice,
            calls=tuple(ToolCall(call.name, call.arguments) for call in chunk.tool_calls),
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
        degraded=complete.degraded,
        matched=None if matched is None else getattr(complete, matched),
        cached_tokens=complete.usage.cached_tokens,
        choice=message.choice,
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
    values["expert_load"] = [resilience_pb2.ExpertLoad(tokens=row) for row in status.expert_load]
    values["buckets"] = [resilience_pb2.StepShape(decode=rows, tiles=tiles) for rows, tiles in status.buckets]
    return resilience_pb2.Status(**values)


def _rank_message(rank: RankStatus) -> resilience_pb2.Rank:
    values = {f.name: getattr(rank, f.name) for f in dataclasses.fields(rank)}
    values["slots"] = [resilience_pb2.Slots(experts=row) for row in rank.slots]
    values["loss"] = resilience_pb2.LossCost(**dataclasses.asdict(rank.loss)) if rank.loss is not None else None
    return resilience_pb2.Rank(**values)


def status_value(message: resilience_pb2.Status) -> Status:
    """What `status_message` was made from."""
    values = {f.name: getattr(message, f.name) for f in dataclasses.fields(Status)}
    values["ranks"] = tuple(_rank_value(r) for r in message.ranks)
    values["masked"] = tuple((m.layer, m.expert) for m in message.masked)
    values["expert_load"] = tuple(tuple(row.tokens) for row in message.expert_load)
    values["buckets"] = tuple((shape.decode, shape.tiles) for shape in message.buckets)
    values["axes"], values["lattice"] = (
        dict(sorted(message.axes.items())),
        dict(sorted(message.lattice.items())),
    )
    return Status(**values)


def _rank_value(message: resilience_pb2.Rank) -> RankStatus:
    values = {f.name: getattr(message, f.name) for f in dataclasses.fields(RankStatus)}
    values["pid"] = message.pid if message.HasField("pid") else None
    values["slots"] = tuple(tuple(s.experts) for s in message.slots)
    values["loss"] = None
    if message.HasField("loss"):
        names = [f.name for f in dataclasses.fields(LossCost)]
        values["loss"] = LossCost(**{name: getattr(message.loss, name) for name in names})
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


def prospect_message(prospect: Prospect) -> resilience_pb2.Prospect:
    """What a loss would cost."""
    return resilience_pb2.Prospect(**dataclasses.asdict(prospect))


def prospect_value(message: resilience_pb2.Prospect) -> Prospect:
    """What `prospect_message` was made from."""
    values: dict[str, Any] = {f.name: getattr(message, f.name) for f in dataclasses.fields(Prospect)}
    values["ranks"] = tuple(message.ranks)
    return Prospect(**values)


def instruction_message(instruction: Instruction) -> resilience_pb2.ApplyRequest:
    """A planned change."""
    values = {f.name: getattr(instruction, f.name) for f in dataclasses.fields(instruction)}
    return resilience_pb2.ApplyRequest(**{k: v for k, v in values.items() if v is not None})


def instruction_value(message: resilience_pb2.ApplyRequest) -> Instruction:
    """What `instruction_message` was made from. Raises InvalidRequest."""
    given: dict[str, Any] = {name: getattr(message, name) for name in ("to", "timeout_s") if message.HasField(name)}
    return Instruction(
        action=message.action,  # type: ignore[arg-type] - checked by Instruction
        ranks=tuple(message.ranks),
        host=message.host,
        replace=message.replace,
        **given,
    )


def _packed(detail: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
