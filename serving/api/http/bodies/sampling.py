"""The fields that /v1/completions and /v1/chat/completions share."""

from typing import Annotated, Any

import msgspec

from serving.api.http.bodies.constraints import ConstraintFields
from serving.api.http.bodies.rules import accepted, ignored, refused, used
from serving.text.validation import MAX_CHOICES, MAX_TEMPERATURE, MAX_TOP_LOGPROBS

_LABEL = "a label of the caller's; nothing depends on it"
_ELSEWHERE = "of disaggregated deployments of other servers"


class StreamOptions(msgspec.Struct, kw_only=True):
    """Options of a stream."""

    include_usage: Annotated[bool | None, used("Send the usage in a last event; a whole answer always has it.")] = None
    continuous_usage_stats: Annotated[bool | None, used("With include_usage: the usage so far in each event.")] = None
    include_obfuscation: Annotated[Any, ignored("events are not padded", True, False)] = None


class GenerationFields(ConstraintFields, kw_only=True):
    """Fields of a request that generates text."""

    model: Annotated[str | None, used("Name of the model; without it, the one that is served.")] = None
    n: Annotated[int | None, used("Number of answers to each prompt.", minimum=1, maximum=MAX_CHOICES)] = None
    best_of: Annotated[int | None, used("Must equal n: all sampled answers are returned.", minimum=1)] = None
    max_tokens: Annotated[
        int | None, used("Most tokens of an answer; -1, as without it: all that fit.", minimum=-1)
    ] = None
    min_tokens: Annotated[int | None, used("No stop ends an answer before it has that many.", minimum=0)] = None
    temperature: Annotated[float | None, used("0 takes the likeliest token.", minimum=0, maximum=MAX_TEMPERATURE)] = (
        None
    )
    top_p: Annotated[float | None, used("Share of probability to sample from.", exclusiveMinimum=0, maximum=1)] = None
    top_k: Annotated[int | None, used("Number of tokens to sample from; 0 and -1: all.", minimum=-1)] = None
    min_p: Annotated[
        float | None, used("Least probability of a token, relative to the likeliest.", minimum=0, maximum=1)
    ] = None
    frequency_penalty: Annotated[float | None, used("As in OpenAI's API.", minimum=-2, maximum=2)] = None
    presence_penalty: Annotated[float | None, used("As in OpenAI's API.", minimum=-2, maximum=2)] = None
    repetition_penalty: Annotated[float | None, used("As in vLLM.", minimum=0.01, maximum=100)] = None
    logit_bias: Annotated[
        dict[int, Annotated[float, msgspec.Meta(extra_json_schema={"minimum": -100, "maximum": 100})]] | None,
        used("Added to the logits of tokens, by token id."),
    ] = None
    seed: Annotated[int | None, used("The same seed gives the same answer, whoever dies.")] = None
    stop: Annotated[str | list[str] | None, used("Text, or texts, before which an answer ends.")] = None
    stop_token_ids: Annotated[list[int] | None, used("Tokens after which an answer ends.")] = None
    ignore_eos: Annotated[bool | None, used("Go on after the model's own stop tokens.")] = None
    prompt_logprobs: Annotated[
        int | None,
        used("Log-probabilities of the prompt, with that many alternatives.", minimum=0, maximum=MAX_TOP_LOGPROBS),
    ] = None
    priority: Annotated[
        int | None,
        used("Of one caller's waiting requests the lowest runs first.", minimum=-(2**31), maximum=2**31 - 1),
    ] = None
    speculate: Annotated[
        bool | None, used("Draft tokens ahead, which changes none of them. Default: as the server does.")
    ] = None
    stream: Annotated[bool | None, used("Answer with server-sent events.")] = None
    stream_options: Annotated[StreamOptions | None, used("Options of a stream.")] = None
    event_ids: Annotated[
        bool | None,
        used("Give the events of a stream ids, from which `/v1/resume` goes on. So does `X-Moejax-Event-Ids: true`."),
    ] = None

    skip_special_tokens: Annotated[Any, accepted("special tokens have no text", True)] = None
    spaces_between_special_tokens: Annotated[Any, ignored("special tokens have no text", True, False)] = None
    include_stop_str_in_output: Annotated[Any, accepted("an answer ends before a stop string", False)] = None
    no_stop_trim: Annotated[Any, accepted("an answer ends before a stop string", False)] = None
    use_beam_search: Annotated[Any, accepted("answers are sampled", False)] = None
    length_penalty: Annotated[Any, ignored("only a beam search has one", 1)] = None
    early_stopping: Annotated[Any, ignored("only a beam search has it", False)] = None
    allowed_token_ids: Annotated[Any, accepted("send a constraint or logit_bias", [])] = None
    bad_words: Annotated[Any, accepted("send logit_bias", [])] = None
    stop_regex: Annotated[Any, accepted("stops are texts or tokens", [], "")] = None
    truncate_prompt_tokens: Annotated[Any, accepted("a prompt is never cut", -1)] = None
    truncation_side: Annotated[Any, ignored("a prompt is never cut")] = None
    logits_processors: Annotated[Any, accepted("code of callers is not run", [])] = None
    custom_logit_processor: Annotated[Any, accepted("code of callers is not run")] = None
    custom_params: Annotated[Any, ignored("they are for custom_logit_processor", {})] = None
    return_token_ids: Annotated[Any, accepted("logprobs has the tokens of an answer", False)] = None
    return_tokens_as_token_ids: Annotated[Any, accepted("logprobs has the tokens as text", False)] = None
    return_hidden_states: Annotated[Any, accepted("they do not leave the ranks", False)] = None
    return_routed_experts: Annotated[Any, accepted("they do not leave the ranks", False)] = None
    lora_path: Annotated[Any, accepted("there are no adapters")] = None
    session_params: Annotated[Any, accepted("there are no sessions; prefixes are cached by themselves")] = None
    cache_salt: Annotated[Any, accepted("all callers share the prefix cache")] = None
    extra_key: Annotated[Any, accepted("all callers share the prefix cache")] = None
    prompt_embeds: Annotated[Any, refused("prompts are text or tokens")] = None
    input_embeds: Annotated[Any, refused("prompts are text or tokens")] = None
    kv_transfer_params: Annotated[Any, accepted(_ELSEWHERE, {})] = None
    bootstrap_host: Annotated[Any, accepted(_ELSEWHERE)] = None
    bootstrap_port: Annotated[Any, accepted(_ELSEWHERE)] = None
    bootstrap_room: Annotated[Any, accepted(_ELSEWHERE)] = None
    data_parallel_rank: Annotated[Any, ignored("the scheduler chooses the rank")] = None
    vllm_xargs: Annotated[Any, ignored("they are for plugins of vLLM", {})] = None
    request_id: Annotated[Any, ignored("send the header X-Request-Id")] = None
    rid: Annotated[Any, ignored("send the header X-Request-Id")] = None
    user: Annotated[Any, ignored(_LABEL)] = None
    metadata: Annotated[Any, ignored(_LABEL, {})] = None
    safety_identifier: Annotated[Any, ignored(_LABEL)] = None
    prompt_cache_key: Annotated[Any, ignored("prefixes are cached by their content")] = None
    prompt_cache_retention: Annotated[Any, ignored("prefixes are cached while there is room")] = None
    store: Annotated[Any, ignored("answers are kept as --journal says", False)] = None
    service_tier: Annotated[Any, ignored("there is one", "auto", "default")] = None
