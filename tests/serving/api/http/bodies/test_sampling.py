"""Bodies that real programs send, as they were seen on the wire: none of them is refused."""

import pytest

from serving.api.http.openai_requests import parse_completion

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
GUIDELLM = {
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    "ignore_eos": True,
    "stop": None,
}
ROUTER = {
    "no_stop_trim": False,
    "ignore_eos": False,
    "skip_special_tokens": True,
    "return_hidden_states": False,
    "stream": False,
}
VLLM_DEFAULTS = {
    "skip_special_tokens": True,
    "include_stop_str_in_output": False,
    "spaces_between_special_tokens": True,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "return_token_ids": False,
    "echo": False,
    "allowed_token_ids": None,
    "bad_words": [],
    "kv_transfer_params": None,
    "stream_options": {},
    "best_of": None,
    "logprobs": None,
}
CHAT_DEFAULTS = {
    "add_generation_prompt": True,
    "continue_final_message": False,
    "add_special_tokens": False,
    "separate_reasoning": True,
    "stream_reasoning": True,
    "parallel_tool_calls": True,
    "modalities": ["text"],
    "functions": [],
    "tool_choice": "none",
}


@pytest.mark.parametrize("sent", [GUIDELLM, ROUTER, VLLM_DEFAULTS], ids=["guidellm", "router", "vllm"])
@pytest.mark.parametrize("chat", [True, False])
def test_fields_at_the_values_of_other_servers_ask_for_nothing(sent, chat):
    body = ({**CHAT, **CHAT_DEFAULTS} if chat else {"prompt": "hi"}) | sent
    request = parse_completion(body, chat=chat, models=["m"], strict=True)
    assert request.ignored == ()
    assert request.usage_so_far == (sent is GUIDELLM)


def test_labels_and_hints_of_openai_are_ignored():
    labels = ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "verbosity", "service_tier")
    sent = dict.fromkeys(labels, "x") | {"metadata": {"a": "b"}, "store": True}
    assert set(parse_completion(CHAT | sent, chat=True, models=["m"]).ignored) == set(sent)


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("json_schema", '{"type": "object"}', "json"),
        ("guided_json", {"type": "object"}, "json"),
        ("guided_regex", "a+", "regex"),
        ("guided_choice", ["a"], "choice"),
        ("guided_grammar", 'start: "a"', "lark"),
        ("structured_outputs", {"json_object": True, "regex": None}, "json"),
    ],
)
def test_a_constraint_is_never_ignored_whatever_it_is_called(field, value, kind):
    outputs = parse_completion(CHAT | {field: value}, chat=True, models=["m"]).params.structured_outputs
    assert outputs is not None
    assert outputs.kind == kind
