"""Requests, stream items and the model's description as protobuf messages: `x_to_proto` and `x_from_proto`."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from serving.core.answers import AnswerItem, Chunk, Complete, PromptScores
from serving.core.prompts import Conversation, Prompt
from serving.errors import InvalidRequest
from serving.proto.moejax.v1 import inference_pb2
from serving.protocol.prepared_model import ModelInfo
from serving.protocol.sampling import SamplingDefaults, SamplingParams, StructuredOutputs, TopLogprobs
from serving.text.answer_parts import InvalidToolCall, ToolCall
from serving.text.messages import read_message
from serving.text.tokenizer import Message
from serving.text.tool_calls import PARAMETERS, read_tool_choice, read_tools
from serving.text.validation import FieldNames

_GUIDES: Mapping[Any, str] = {"json": "json_schema", "regex": "regex", "lark": "grammar", "choice": "choice"}
NAMES = FieldNames({PARAMETERS: "tools[]"}, response_format="json_schema", structured_outputs="grammar")
"""The names of the messages for the fields of chat completions."""
VLLM_NAMES = FieldNames(
    prompt="input", top_logprobs="logprobs", response_format="json_schema", structured_outputs="grammar"
)
"""The names of vLLM's messages for the fields of chat completions."""
_REASONS = {
    "stop": inference_pb2.FINISH_REASON_STOP,
    "length": inference_pb2.FINISH_REASON_LENGTH,
    "tool_calls": inference_pb2.FINISH_REASON_TOOL_CALLS,
}


def request_to_proto(prompt: Prompt, params: SamplingParams, request_id: str = "") -> inference_pb2.GenerateRequest:
    """The message of a request. Raises InvalidRequest when a number does not fit its field."""
    try:
        message = inference_pb2.GenerateRequest(request_id=request_id, sampling=_sampling_to_proto(params))
        if not _set_text(message, prompt):
            message.token_ids.SetInParent()
            message.token_ids.ids.extend(prompt)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"the request cannot be sent: {error}") from error
    return message


def tokenize_to_proto(prompt: Prompt) -> inference_pb2.TokenizeRequest:
    """The message that asks for the tokens of a prompt. Raises InvalidRequest for a prompt of tokens."""
    message = inference_pb2.TokenizeRequest()
    if not _set_text(message, prompt):
        raise InvalidRequest(
            f"the prompt is a list of {len(prompt)} token ids, which are its tokens. Send text or messages.",  # type: ignore[arg-type]
            param="prompt",
        )
    return message


def tokens_to_proto(ids: Sequence[int]) -> inference_pb2.TokenIds:
    """The message of token ids. Raises InvalidRequest when one does not fit its field."""
    try:
        return inference_pb2.TokenIds(ids=ids)
    except ValueError as error:
        raise InvalidRequest(f"the token ids cannot be sent: {error}", param="token_ids") from error


def _set_text(message: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest, prompt: Prompt) -> bool:
    """Write a prompt that is text or messages into a message; False for one of tokens."""
    if isinstance(prompt, str):
        message.text = prompt
    elif isinstance(prompt, Conversation):
        message.chat.messages.extend(map(_turn_to_proto, prompt.messages))
        message.chat.tools.extend(json.dumps(tool) for tool in prompt.tools)
        message.chat.template_variables = json.dumps(prompt.variables) if prompt.variables else ""
        message.chat.one_tool_call = not prompt.parallel_tool_calls
    elif prompt and isinstance(prompt[0], Message):
        turns = [inference_pb2.Message(role=m.role, content=[m.content]) for m in prompt]  # type: ignore[union-attr]
        message.chat.messages.extend(turns)
    else:
        return False
    return True


def _turn_to_proto(turn: Mapping[str, Any]) -> inference_pb2.Message:
    calls = [
        inference_pb2.ToolCall(
            id=call.get("id", ""),
            name=call["function"]["name"],
            arguments=_arguments(call["function"].get("arguments", {})),
        )
        for call in turn.get("tool_calls") or ()
    ]
    content = turn.get("content")
    texts = [part["text"] for part in content] if isinstance(content, list) else [] if content is None else [content]
    more = {name: turn[name] for name in ("name", "tool_call_id") if turn.get(name)}
    if isinstance(reasoning := turn.get("reasoning_content"), str):
        more["reasoning"] = reasoning
    return inference_pb2.Message(role=turn["role"], content=texts, tool_calls=calls, **more)


def _arguments(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _turn_from_proto(message: inference_pb2.Message) -> Mapping[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": [{"type": "text", "text": t} for t in message.content]}
    if message.tool_calls:
        turn["tool_calls"] = [_previous_tool_call(call) for call in message.tool_calls]
        turn["content"] = turn["content"] or None
    if message.reasoning:
        turn["reasoning_content"] = message.reasoning
    turn |= {name: text for name in ("name", "tool_call_id") if (text := getattr(message, name))}
    return read_message(turn, "message")


def _previous_tool_call(call: inference_pb2.ToolCall) -> Mapping[str, Any]:
    value = {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
    return {"id": call.id, **value} if call.id else value


def _json(text: str, param: str) -> Any:
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        raise InvalidRequest(f"{param} is not valid JSON.", param=param) from None


def tool_choice_constraint(message: inference_pb2.GenerateRequest) -> StructuredOutputs | None:
    """The constraint that `tool_choice` puts on the output, or None.

    Raises InvalidRequest when it is not valid, or when the request has another constraint too.
    """
    guide = _choice(message.chat)[1] if message.WhichOneof("prompt") == "chat" else None
    if guide is not None and message.sampling.WhichOneof("guide") is not None:
        raise InvalidRequest("tool_choice and another constraint exclude each other.", param="tool_choice")
    return guide


def _choice(chat: inference_pb2.Chat) -> tuple[Sequence[Mapping[str, Any]], StructuredOutputs | None]:
    named = chat.tool_choice not in ("", "auto", "none", "required")
    value = {"function": {"name": chat.tool_choice}} if named else chat.tool_choice or None
    return read_tool_choice(value, _tools(chat.tools))


def prompt_from_proto(message: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest) -> Prompt:
    """The prompt of a request. Raises InvalidRequest when it has none."""
    match message.WhichOneof("prompt"):
        case "text":
            return message.text
        case "token_ids":
            return tuple(message.token_ids.ids)  # type: ignore[union-attr]
        case "chat":
            variables = _json(message.chat.template_variables, "template_variables")
            if not isinstance(variables, dict):
                raise InvalidRequest("template_variables must be a JSON object.", param="template_variables")
            messages = tuple(map(_turn_from_proto, message.chat.messages))
            return Conversation(
                messages=messages,
                tools=tuple(_choice(message.chat)[0]),
                variables=variables,
                parallel_tool_calls=not message.chat.one_tool_call,
            )
    raise InvalidRequest("the request has no prompt. Set text, token_ids or chat.", param="prompt")


def _tools(texts: Sequence[str]) -> tuple[Mapping[str, Any], ...]:
    try:
        return read_tools([json.loads(text) for text in texts])
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"a tool is not valid JSON: {error}", param="tools") from None


def _sampling_to_proto(params: SamplingParams) -> inference_pb2.SamplingParams:
    values = {f.name: getattr(params, f.name) for f in dataclasses.fields(params)}
    values["stop_token_ids"] = values.pop("stop_tokens")
    values["logit_bias"] = dict(values["logit_bias"])
    guide = values.pop("structured_outputs")
    if guide is not None:
        texts = guide.text if guide.kind != "choice" else inference_pb2.Choices(texts=json.loads(guide.text))
        values[_GUIDES[guide.kind]] = texts
    return inference_pb2.SamplingParams(**{k: v for k, v in values.items() if v is not None})


def sampling_from_proto(message: inference_pb2.SamplingParams) -> SamplingParams:
    """Sampling parameters. A field that is not set has its default."""
    maybe = ("temperature", "top_k", "top_p", "min_p", "seed", "max_tokens", "n", "repetition_penalty")
    plain = ("ignore_eos", "min_tokens", "frequency_penalty", "presence_penalty", "top_logprobs", "priority")
    given: dict[str, Any] = {
        name: getattr(message, name) for name in (*maybe, "prompt_logprobs", "speculate") if message.HasField(name)
    }
    return SamplingParams(
        **given,
        **{name: getattr(message, name) for name in plain},
        stop=tuple(message.stop),
        stop_tokens=tuple(message.stop_token_ids),
        logit_bias=tuple(sorted(message.logit_bias.items())),
        structured_outputs=_guide_from_proto(message),
    )


def _guide_from_proto(message: inference_pb2.SamplingParams) -> StructuredOutputs | None:
    match message.WhichOneof("guide"):
        case None:
            return None
        case "choice":
            if not message.choice.texts:
                raise InvalidRequest("choice has no texts. Give at least one.", param="choice")
            return StructuredOutputs("choice", json.dumps(list(message.choice.texts)), param="choice")
        case field:
            kind = next(kind for kind, name in _GUIDES.items() if name == field)
            return StructuredOutputs(kind, getattr(message, field), param=field)


def response_to_proto(item: AnswerItem) -> inference_pb2.GenerateResponse:
    """The message of one item of a stream."""
    if isinstance(item, PromptScores):
        scores = inference_pb2.PromptScores(
            position=item.position, token_ids=item.token_ids, logprobs=item.logprobs, top=_top_to_proto(item.top)
        )
        return inference_pb2.GenerateResponse(prompt_scores=scores, choice=item.choice)
    if isinstance(item, Chunk):
        chunk = inference_pb2.Chunk(
            token_ids=item.token_ids,
            text=item.text,
            logprobs=item.logprobs,
            first_index=item.index,
            epoch=item.epoch,
            weights_version=item.weights_version,
            top=_top_to_proto(item.top),
            tool_calls=[_call_to_proto(call) for call in item.calls],
            reasoning=item.reasoning,
            invalid_calls=[inference_pb2.InvalidToolCall(text=c.text, error=c.error) for c in item.invalid_calls],
        )
        return inference_pb2.GenerateResponse(chunk=chunk, choice=item.choice)
    complete = inference_pb2.Complete(
        finish_reason=_REASONS[item.reason],
        usage=inference_pb2.Usage(
            prompt_tokens=item.prompt_tokens,
            completion_tokens=item.completion_tokens,
            cached_tokens=item.cached_tokens,
            accepted_prediction_tokens=item.accepted_drafts,
        ),
        epochs=item.epochs,
        request_id=item.request_id,
        seed=item.seed,
        degraded=item.degraded,
        weights_versions=[
            inference_pb2.WeightsTokens(version=label, tokens=count) for label, count in item.weights_versions
        ],
    )
    if isinstance(item.matched, str):
        complete.stop_string = item.matched
    elif item.matched is not None:
        complete.stop_token = item.matched
    return inference_pb2.GenerateResponse(complete=complete, choice=item.choice)


def _call_to_proto(call: ToolCall) -> inference_pb2.ToolCall:
    return inference_pb2.ToolCall(id=call.id, name=call.name, arguments=call.arguments)


def _top_to_proto(top: Sequence[TopLogprobs]) -> list[inference_pb2.Top]:
    return [inference_pb2.Top(token_ids=[t for t, _ in each], logprobs=[p for _, p in each]) for each in top]


def _top_from_proto(messages: Sequence[inference_pb2.Top]) -> tuple[TopLogprobs, ...]:
    return tuple(tuple(zip(each.token_ids, each.logprobs, strict=True)) for each in messages)


def response_from_proto(message: inference_pb2.GenerateResponse) -> AnswerItem:
    """The inverse of `response_to_proto`."""
    event = message.WhichOneof("event")
    if event == "prompt_scores":
        scores = message.prompt_scores
        return PromptScores(
            position=scores.position,
            token_ids=tuple(scores.token_ids),
            logprobs=tuple(scores.logprobs),
            top=_top_from_proto(scores.top),
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
            weights_version=chunk.weights_version,
            top=_top_from_proto(chunk.top),
            choice=message.choice,
            reasoning=chunk.reasoning,
            calls=tuple(ToolCall(call.name, call.arguments, call.id) for call in chunk.tool_calls),
            invalid_calls=tuple(InvalidToolCall(call.text, call.error) for call in chunk.invalid_calls),
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
        accepted_drafts=complete.usage.accepted_prediction_tokens,
        choice=message.choice,
        weights_versions=tuple((each.version, each.tokens) for each in complete.weights_versions),
    )


def model_to_proto(model: ModelInfo) -> inference_pb2.ModelInfo:
    """The message that describes the model."""
    values = {k: v for k, v in dataclasses.asdict(model).items() if v is not None}
    defaults = {k: v for k, v in values.pop("sampling_defaults").items() if v is not None}
    return inference_pb2.ModelInfo(**values, sampling_defaults=inference_pb2.SamplingDefaults(**defaults))


def model_from_proto(message: inference_pb2.ModelInfo) -> ModelInfo:
    """The inverse of `model_to_proto`."""
    values = {f.name: getattr(message, f.name) for f in dataclasses.fields(ModelInfo)}
    values["stop_tokens"] = tuple(message.stop_tokens)
    values["bos_token"] = message.bos_token if message.HasField("bos_token") else None
    values["sampling_defaults"] = _sampling_defaults(message)
    return ModelInfo(**values)


def _sampling_defaults(message: inference_pb2.ModelInfo) -> SamplingDefaults:
    if not message.HasField("sampling_defaults"):  # of a server that does not send them
        return SamplingDefaults()
    sent = message.sampling_defaults
    values: dict[str, Any] = {f.name: getattr(sent, f.name) for f in dataclasses.fields(SamplingDefaults)}
    if not sent.HasField("max_tokens"):
        values["max_tokens"] = None
    return SamplingDefaults(**values)
