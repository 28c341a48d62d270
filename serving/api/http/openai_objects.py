"""The objects of OpenAI's API that responses consist of, as msgspec models. A field that is UNSET is left out."""

import msgspec
from msgspec import UNSET, UnsetType

from serving.protocol.sampling import SamplingDefaults
from serving.text.answer_parts import InvalidToolCall


class PromptTokensDetails(msgspec.Struct, kw_only=True):
    """Details of the prompt's tokens; `cached_tokens` of them were in a prefix cache."""

    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, kw_only=True):
    """Details of the answers' tokens; a draft had guessed `accepted_prediction_tokens` of them."""

    accepted_prediction_tokens: int


class Usage(msgspec.Struct, kw_only=True):
    """Numbers of tokens of a call. Each prompt counts once, whatever `n` is. `completion_tokens_details` are there if a
    draft had guessed a token. `weights_versions` has the completion tokens by the version of the weights that computed
    them, in the order in which the versions came into force."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    weights_versions: dict[str, int]
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


class Degradation(msgspec.Struct, kw_only=True):
    """A fact for which OpenAI has no field: experts were masked in these epochs."""

    degraded: bool
    epochs: list[int]


class TopLogprob(msgspec.Struct, kw_only=True):
    """A token with its log-probability. `bytes` of the tokens, put together, are the text in UTF-8."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob, kw_only=True):
    """A token of an answer, with the likeliest tokens in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, kw_only=True):
    """Log-probabilities of the tokens of a message."""

    content: list[TokenLogprob]


class TextLogprobs(msgspec.Struct, kw_only=True):
    """Log-probabilities of the tokens of a text. `text_offset` is where each begins, in characters; a token within a
    character has that character's."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class PromptLogprob(msgspec.Struct, kw_only=True):
    """The log-probability of a token of the prompt, in vLLM's format; `rank` 1 is the likeliest in its place."""

    logprob: float
    rank: int | None
    decoded_token: str


class FunctionCall(msgspec.Struct, kw_only=True):
    """The function that a tool call names; `arguments` is JSON."""

    name: str
    arguments: str


class MessageToolCall(msgspec.Struct, kw_only=True):
    """A tool call of a message."""

    id: str
    type: str
    function: FunctionCall


class DeltaToolCall(MessageToolCall, kw_only=True):
    """A tool call of a stream."""

    index: int


class ChatMessage(msgspec.Struct, kw_only=True):
    """The answer to a conversation."""

    role: str
    content: str | None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[MessageToolCall] | UnsetType = UNSET
    invalid_tool_calls: list[InvalidToolCall] | UnsetType = UNSET


class Delta(msgspec.Struct, kw_only=True):
    """The part of a message that an event adds."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[DeltaToolCall] | UnsetType = UNSET
    invalid_tool_calls: list[InvalidToolCall] | UnsetType = UNSET


class Choice(msgspec.Struct, kw_only=True):
    """Base of the choices: which answer of the call it is, and how it ended."""

    index: int
    finish_reason: str | None


class ChatChoice(Choice, kw_only=True):
    """One answer to a conversation."""

    message: ChatMessage
    logprobs: ChatLogprobs | None


class ChatChunkChoice(Choice, kw_only=True):
    """A part of one answer to a conversation."""

    delta: Delta
    logprobs: ChatLogprobs | None


class TextChoice(Choice, kw_only=True):
    """One answer to a prompt, or a part of it."""

    text: str
    logprobs: TextLogprobs | None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | UnsetType = UNSET


class Completion(msgspec.Struct, kw_only=True):
    """Base of the responses. In a stream the last event has the usage, if requested, and no choice. `weights_version`
    is that of the last token; it is left out before the first one."""

    id: str
    object: str
    created: int
    model: str
    usage: Usage | UnsetType | None = UNSET
    weights_version: str | UnsetType = UNSET
    moejax: Degradation | UnsetType = UNSET


class ChatCompletion(Completion, kw_only=True):
    """The response of /v1/chat/completions."""

    choices: list[ChatChoice]


class ChatCompletionChunk(Completion, kw_only=True):
    """An event of a stream of /v1/chat/completions."""

    choices: list[ChatChunkChoice]


class TextCompletion(Completion, kw_only=True):
    """The response of /v1/completions, and an event of its stream."""

    choices: list[TextChoice]


class Model(msgspec.Struct, kw_only=True):
    """The model that is served, under one of its names."""

    id: str
    object: str
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    default_sampling_params: SamplingDefaults


class ModelList(msgspec.Struct, kw_only=True):
    """The names of the model."""

    object: str
    data: list[Model]


class Tokens(msgspec.Struct, kw_only=True):
    """The tokens of a prompt; `token_strs` are their names in the vocabulary, for those who asked."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | UnsetType = UNSET


class TokenText(msgspec.Struct, kw_only=True):
    """The text of tokens."""

    prompt: str


class ErrorDetail(msgspec.Struct, kw_only=True):
    """An error: what is wrong, its kind, the path of the field at fault, and OpenAI's code."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, kw_only=True):
    """The body of every response that is an error."""

    error: ErrorDetail
