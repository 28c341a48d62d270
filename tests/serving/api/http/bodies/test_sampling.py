"""Bodies that real programs send, as they were seen on the wire: none of them is refused."""

import json

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
        ("response_format", {"type": "json_object", "schema": {"const": 1}}, "json"),
        ("response_format", {"type": "json_schema", "schema": {"const": 1}}, "json"),
    ],
)
def test_a_constraint_is_never_ignored_whatever_it_is_called(field, value, kind):
    outputs = parse_completion(CHAT | {field: value}, chat=True, models=["m"]).params.structured_outputs
    assert outputs is not None
    assert outputs.kind == kind
    if isinstance(value, dict) and "schema" in value:
        assert json.loads(outputs.text) == value["schema"]


@pytest.mark.parametrize("chat", [True, False])
def test_values_as_other_languages_and_servers_write_them_mean_the_same(chat):
    body = CHAT if chat else {"prompt": "hi"}
    asked = {"max_tokens": 3.0, "n": 1.0, "seed": 1.0, "top_k": 40.0, "stop_token_ids": [2.0]}  # of a Java client
    params = parse_completion(body | asked, chat=chat, models=["m"]).params
    whole = (params.max_tokens, params.n, params.seed, params.top_k, params.stop_tokens)
    assert whole == (3, 1, 1, 40, (2,))
    assert all(type(each) is int for each in (*whole[:-1], *whole[-1]))
    assert parse_completion(body | {"max_tokens": -1}, chat=chat, models=["m"]).params.max_tokens is None
    for options in ({"include_usage": True}, {"continuous_usage_stats": True}, {}):
        assert parse_completion(body | {"stream_options": options}, chat=chat, models=["m"], strict=True).ignored == ()


def test_a_constraint_that_is_an_empty_text_is_none():
    empty = dict.fromkeys(("regex", "json_schema", "guided_json", "guided_regex", "guided_grammar"), "")
    inside = {"structured_outputs": {"json": "", "regex": "", "grammar": ""}}
    assert parse_completion(CHAT | empty | inside, chat=True, models=["m"]).params.structured_outputs is None
    one = parse_completion(CHAT | empty | {"regex": "a"}, chat=True, models=["m"]).params.structured_outputs
    assert one is not None
    assert (one.kind, one.text) == ("regex", "a")


def test_the_newer_limit_of_tokens_wins_also_when_it_is_none():
    asked = CHAT | {"max_completion_tokens": -1}
    assert parse_completion(asked, chat=True, models=["m"]).params.max_tokens is None


def test_any_is_mistrals_word_for_a_required_call():
    tools = [{"function": {"name": "f", "parameters": {}}}]
    required, other = (
        parse_completion(CHAT | {"tools": tools, "tool_choice": choice}, chat=True, models=["m"]).params
        for choice in ("required", "any")
    )
    assert required == other
    assert required.structured_outputs is not None
