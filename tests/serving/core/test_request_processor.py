"""RequestProcessor: what is accepted, what is refused by which name, and how streams end."""

import contextlib
import dataclasses

import numpy as np
import pytest

from serving.core.answers import Chunk, Complete
from serving.core.prompts import Conversation
from serving.core.request_processor import RequestProcessor
from serving.errors import (
    Cancelled,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    NoCapacity,
    PromptTooLong,
    QueueFull,
)
from serving.observability.metrics import Metrics
from serving.protocol.sampling import SamplingDefaults, SamplingParams, StructuredOutputs
from serving.text.answer_parts import CUT, InvalidToolCall, ToolCall
from serving.text.tokenizer import Message
from simulation.byte_tokenizer import byte_tokenizer
from tests.support.fake_backend import FakeBackend

pytestmark = pytest.mark.anyio

DEFAULT = SamplingParams()


async def collect(processor, prompt, params=DEFAULT, **arguments):
    request = await processor.accept(prompt, params, **arguments)
    return [item async for item in processor.stream(request, params.stop)]


def text(items) -> str:
    return "".join(i.text for i in items if isinstance(i, Chunk))


REFUSED = [
    ("temperature", {"temperature": -0.1}, "temperature is -0.1; it must be between 0.0 and 100.0"),
    ("temperature", {"temperature": float("nan")}, "temperature is nan"),
    ("temperature", {"temperature": float("inf")}, "temperature is inf"),
    ("top_p", {"top_p": 0.0}, "top_p is 0, which leaves no token"),
    ("top_p", {"top_p": 1.5}, "top_p is 1.5"),
    ("top_p", {"top_p": float("nan")}, "top_p is nan"),
    ("min_p", {"min_p": -1.0}, "min_p is -1.0"),
    ("top_k", {"top_k": -2}, "top_k is -2; it must be between -1"),
    ("top_k", {"top_k": 2**40}, "top_k is 1099511627776"),
    ("max_tokens", {"max_tokens": 0}, "max_tokens is 0; it must be between 1"),
    ("max_tokens", {"max_tokens": -5}, "max_tokens is -5"),
    ("max_tokens", {"max_tokens": 2**40}, "max_tokens is 1099511627776"),
    ("max_tokens", {"max_tokens": 256}, "a prompt of 1 tokens leaves 255"),
    ("seed", {"seed": 2**63}, "seed is 9223372036854775808"),
    ("seed", {"seed": 10**400}, "seed is 1000"),
    ("top_k", {"top_k": 10**400}, "top_k is 1000"),
    ("logit_bias", {"logit_bias": ((300, 1.0),)}, "token 0 is 300; this model's vocabulary has 300"),
    ("logit_bias", {"logit_bias": ((1, float("nan")),)}, "the bias of token 1 is nan"),
    ("stop", {"stop": ("x",) * 17}, "stop has 17 texts; at most 16"),
    ("stop", {"stop": ("",)}, "a text of stop has 0 characters"),
    ("stop", {"stop": ("x" * 257,)}, "a text of stop has 257 characters"),
    ("stop_token_ids", {"stop_tokens": (300,)}, "token 0 is 300; this model's vocabulary has 300"),
    ("stop_token_ids", {"stop_tokens": (1,) * 65}, "65 stop tokens; at most 64"),
]


@pytest.mark.parametrize(("param", "fields", "message"), REFUSED)
async def test_a_sampling_value_out_of_range_is_refused_by_name(processor, param, fields, message):
    with pytest.raises(InvalidRequest) as caught:
        await processor.accept("x", SamplingParams(**fields))
    assert caught.value.param == param
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ((), "the prompt is empty"),
        ((1, 300), "token 1 is 300; this model's vocabulary has 300 tokens, 0 to 299"),
        ((-1,), "token 0 is -1"),
    ],
)
async def test_a_prompt_that_is_none_is_refused(processor, prompt, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        await processor.accept(prompt, DEFAULT)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("top_p", [1e-300, 1e-40, 5e-324])
async def test_what_lets_in_the_likeliest_token_alone_is_computed_so(processor, top_p):
    sampling = (await processor.accept("x", SamplingParams(top_p=top_p))).sampling
    assert sampling.top_p == np.finfo(np.float32).tiny
    assert (await processor.accept("x", SamplingParams(temperature=top_p))).sampling.temperature == 0


async def test_an_unknown_role_is_refused(processor):
    with pytest.raises(InvalidRequest, match="message 0 has role 'robot'; known roles are system, user"):
        await processor.accept([Message("robot", "x")], DEFAULT)


async def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(processor):
    with pytest.raises(PromptTooLong, match="maximum context length is 256 tokens; the prompt has 256 tokens"):
        await processor.accept("x" * 256, DEFAULT)
    with pytest.raises(PromptTooLong, match="has 30000 tokens"):
        await processor.accept("x" * 30_000, DEFAULT)  # long enough to be encoded in a thread


async def test_the_longest_prompt_leaves_one_token(processor):
    items = await collect(processor, "x" * 255)
    assert items[-1].completion_tokens == 1


@pytest.mark.parametrize("request_id", ["x" * 129, "é", "a\nb"])
async def test_an_id_that_does_not_fit_is_refused(processor, request_id):
    with pytest.raises(InvalidRequest) as caught:
        await processor.accept("x", DEFAULT, request_id=request_id)
    assert caught.value.param == "request_id"


async def test_what_is_left_open_is_decided(processor):
    request = await processor.accept("ab", DEFAULT)
    assert (request.prompt, request.sampling.max_tokens, request.sampling.seed) == ((97, 98), 254, 7)
    assert request.sampling.stop_tokens == {257}
    assert request.deadline is None
    assert request.id


async def test_ignore_eos_leaves_only_the_callers_stop_tokens(processor):
    request = await processor.accept("a", SamplingParams(ignore_eos=True, stop_tokens=(5,)))
    assert request.sampling.stop_tokens == {5}


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1, 0])
async def test_any_seed_of_64_bits_is_taken(processor, seed):
    request = await processor.accept("a", SamplingParams(seed=seed))
    assert 0 <= request.sampling.seed < 2**31


async def test_a_stream_is_the_tokens_then_one_end(processor):
    items = await collect(processor, "a", SamplingParams(max_tokens=3))
    assert [i.token_ids for i in items[:-1]] == [(98,), (99,), (100,)]
    assert [i.index for i in items[:-1]] == [0, 1, 2]
    assert text(items) == "bcd"
    end = items[-1]
    assert (end.reason, end.prompt_tokens, end.completion_tokens, end.epochs) == ("length", 1, 3, (0,))


async def test_half_a_character_is_shown_only_when_nothing_follows(processor, backend):
    backend.reply = list("é".encode())
    items = await collect(processor, "a", SamplingParams(max_tokens=1))
    assert [i.text for i in items[:-1]] == ["", "\ufffd"]
    assert items[1].token_ids == ()


async def test_a_stop_token_is_counted_but_has_no_text(processor, backend):
    backend.reply = [*b"hi", 5, *b"more"]
    items = await collect(processor, "a", SamplingParams(stop_tokens=(5,)))
    assert text(items) == "hi"
    assert (items[-1].reason, items[-1].matched, items[-1].completion_tokens) == ("stop", 5, 3)
    assert list(backend.ended.values()) == ["stop"]


async def test_a_stop_string_ends_the_text_before_it_and_the_request(processor, backend):
    backend.reply = list(b"one two three")
    items = await collect(processor, "a", SamplingParams(stop=("two", "zzz")))
    assert text(items) == "one "
    assert (items[-1].reason, items[-1].matched, items[-1].completion_tokens) == ("stop", "two", 7)
    assert list(backend.ended.values()) == ["left"]
    assert backend.running == 0


async def test_what_was_held_back_for_a_stop_string_comes_at_the_end(processor, backend):
    backend.reply = list(b"one tw")
    assert text(await collect(processor, "a", SamplingParams(stop=("two",)))) == "one tw"


async def test_leaving_the_stream_cancels_the_request(processor, backend):
    request = await processor.accept("a", DEFAULT)
    async with contextlib.aclosing(processor.stream(request)) as items:
        await anext(items)
        assert backend.running == 1
    assert backend.running == 0
    assert backend.ended[request.id] == "left"


async def test_an_abort_is_an_error_and_not_an_end(processor, backend):
    request = await processor.accept("a", DEFAULT)
    items = processor.stream(request)
    await anext(items)
    assert backend.abort(request.id)
    with pytest.raises(Cancelled, match="was aborted after"):
        async for _ in items:
            pass


async def test_a_deadline_is_an_error(processor, backend):
    backend.delay_s = 0.01
    with pytest.raises(DeadlineExceeded, match="the deadline passed after"):
        await collect(processor, "a", timeout_s=0.03)


async def test_epochs_are_those_that_made_tokens(processor, backend):
    request = await processor.accept("a", SamplingParams(max_tokens=4))
    items = []
    async for item in processor.stream(request):
        items.append(item)
        if len(items) == 2:
            await backend.lose(1)
    assert [i.epoch for i in items[:-1]] == [0, 0, 1, 1]
    assert isinstance(items[-1], Complete)
    assert items[-1].epochs == (0, 1)
    assert text(items) == "bcde"


@pytest.mark.parametrize("error", [QueueFull("full"), NoCapacity("none"), Internal("broken")])
async def test_errors_of_the_backend_pass_through(processor, backend, error):
    backend.fail_at = {2: error}
    with pytest.raises(type(error)):
        await collect(processor, "a")
    assert backend.running == 0


async def test_a_backend_that_ends_without_a_reason_is_a_defect(processor, backend):
    async def silent(request):
        return
        yield

    backend.stream = silent
    with pytest.raises(Internal, match="ended without a reason"):
        await collect(processor, "a")


async def test_a_token_that_the_model_has_not_is_refused_in_text_as_by_number(backend):
    tokenizer = byte_tokenizer()
    tokenizer.format.inner.add_special_tokens([f"<|filler {i}|>" for i in range(261, 301)])
    processor = RequestProcessor(backend, tokenizer, Metrics(backend))
    messages = [Message("user", "<|filler 300|>")]
    for prompt, field in (("a<|filler 300|>", "prompt"), (messages, "messages"), ((300,), "prompt")):
        with pytest.raises(InvalidRequest, match="300") as caught:
            await processor.accept(prompt, SamplingParams())
        assert caught.value.param == field
    assert (await processor.accept("a<|filler 299|>", SamplingParams())).prompt == (97, 299)


TOOLS = ({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},)
WITH_TOOLS = "{{ tools }}{% for m in messages %}{{ m.content }}{% endfor %}"


async def answered(reply: str, template: str, prompt, **sampling):
    """The items of an answer that is `reply`, and the request."""
    backend = FakeBackend(reply=tuple(reply.encode()))
    processor = RequestProcessor(backend, byte_tokenizer(template), Metrics(backend))
    request = await processor.accept(prompt, SamplingParams(**sampling), request_id="r")
    return [item async for item in processor.stream(request)], request


def conversation(**fields) -> Conversation:
    return Conversation(messages=({"role": "user", "content": "x"},), **fields)


async def test_reasoning_and_calls_are_split_off_the_text_of_a_conversation():
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    items, _ = await answered(f"why\n</think>\nso {call}", WITH_TOOLS + "<think>\n", conversation(tools=TOOLS))
    chunks = [item for item in items if isinstance(item, Chunk)]
    assert "".join(chunk.reasoning for chunk in chunks) == "why"
    assert text(items) == "so"
    assert [c for chunk in chunks for c in chunk.calls] == [ToolCall("f", '{"a": 1}', "call_r_0")]
    assert items[-1].reason == "tool_calls"


async def test_only_conversations_are_read_in_parts_and_calls_only_with_tools():
    call = '<tool_call>{"name": "f"}</tool_call>'
    for prompt in ("x", (1, 2), conversation(), [Message("user", "x")]):
        items, _ = await answered(f"<think>{call}", "{{ messages[0].content }}", prompt)
        assert text(items) == f"<think>{call}"
        assert items[-1].reason == "stop"


async def test_a_call_that_max_tokens_cuts_is_reported_as_such():
    call = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    items, _ = await answered(call, WITH_TOOLS, conversation(tools=TOOLS), max_tokens=30)
    assert text(items) == ""
    (invalid,) = [each for item in items if isinstance(item, Chunk) for each in item.invalid_calls]
    assert invalid == InvalidToolCall(call[11:30], CUT)
    assert items[-1].reason == "length"


async def test_a_constraint_holds_after_the_reasoning_that_the_prompt_began():
    guide = StructuredOutputs("choice", '["a"]')
    thinking = "{{ messages[0].content }}<think>"
    for template, after in ((thinking, "</think>"), (thinking + "</think>", ""), ("{{ messages[0].content }}", "")):
        _, request = await answered("a", template, conversation(), structured_outputs=guide)
        assert request.sampling.structured_outputs == dataclasses.replace(guide, after=after)


@pytest.mark.parametrize("fields", [{"min_tokens": 1}, {"ignore_eos": True}])
async def test_what_would_break_a_constraint_is_refused_beside_it(processor, fields):
    guide = StructuredOutputs("choice", '["a"]')
    with pytest.raises(InvalidRequest) as caught:
        await processor.accept("x", SamplingParams(structured_outputs=guide, **fields))
    assert caught.value.param == next(iter(fields))


async def test_the_defaults_of_the_model_hold_where_the_caller_says_nothing(backend):
    defaults = SamplingDefaults(temperature=0.2, top_p=0.9, max_tokens=7)
    processor = RequestProcessor(backend, byte_tokenizer(), Metrics(backend), sampling_defaults=defaults)
    request = await processor.accept("x", SamplingParams(top_p=1.0))
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.max_tokens) == (0.2, 1.0, 7)
