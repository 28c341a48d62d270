"""Generation: what is accepted, what is refused by which name, and how streams end."""

import contextlib

import pytest

from serving.errors import (
    Cancelled,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    NoCapacity,
    PromptTooLong,
    QueueFull,
)
from serving.generation import Chunk, Complete
from serving.request import SamplingParams
from serving.tokens import Message

pytestmark = pytest.mark.anyio

DEFAULT = SamplingParams()


async def collect(generation, prompt, params=DEFAULT, **arguments):
    request = await generation.accept(prompt, params, **arguments)
    return [item async for item in generation.stream(request, params.stop)]


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
    ("top_k", {"top_k": -1}, "top_k is -1"),
    ("top_k", {"top_k": 2**40}, "top_k is 1099511627776"),
    ("max_tokens", {"max_tokens": 0}, "max_tokens is 0; it must be between 1"),
    ("max_tokens", {"max_tokens": -5}, "max_tokens is -5"),
    ("max_tokens", {"max_tokens": 2**40}, "max_tokens is 1099511627776"),
    ("max_tokens", {"max_tokens": 256}, "a prompt of 1 tokens leaves 255 of this model's context of 256"),
    ("seed", {"seed": 2**63}, "seed is 9223372036854775808"),
    ("stop", {"stop": ("x",) * 17}, "17 stop strings; at most 16"),
    ("stop", {"stop": ("",)}, "a stop string has 0 characters"),
    ("stop", {"stop": ("x" * 257,)}, "a stop string has 257 characters"),
    ("stop_token_ids", {"stop_tokens": (300,)}, "token 0 is 300; this model's vocabulary has 300"),
    ("stop_token_ids", {"stop_tokens": (1,) * 65}, "65 stop tokens; at most 64"),
]


@pytest.mark.parametrize(("param", "fields", "message"), REFUSED)
async def test_a_sampling_value_out_of_range_is_refused_by_name(generation, param, fields, message):
    with pytest.raises(InvalidRequest) as caught:
        await generation.accept("x", SamplingParams(**fields))
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
async def test_a_prompt_that_is_none_is_refused(generation, prompt, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        await generation.accept(prompt, DEFAULT)
    assert caught.value.param == "prompt"


async def test_an_unknown_role_is_refused(generation):
    with pytest.raises(InvalidRequest, match="message 0 has role 'robot'; known roles are system, user"):
        await generation.accept([Message("robot", "x")], DEFAULT)


async def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(generation):
    with pytest.raises(PromptTooLong, match="has 256 tokens; this model's context is 256"):
        await generation.accept("x" * 256, DEFAULT)
    with pytest.raises(PromptTooLong, match="has 30000 tokens"):
        await generation.accept("x" * 30_000, DEFAULT)  # long enough to be encoded in a thread


async def test_the_longest_prompt_leaves_one_token(generation):
    items = await collect(generation, "x" * 255)
    assert items[-1].completion_tokens == 1


@pytest.mark.parametrize("request_id", ["x" * 129, "é", "a\nb"])
async def test_an_id_that_does_not_fit_is_refused(generation, request_id):
    with pytest.raises(InvalidRequest) as caught:
        await generation.accept("x", DEFAULT, request_id=request_id)
    assert caught.value.param == "request_id"


async def test_what_is_left_open_is_decided(generation):
    request = await generation.accept("ab", DEFAULT)
    assert (request.prompt, request.max_tokens, request.seed) == ((97, 98), 254, 7)
    assert request.stop_tokens == {257}
    assert request.deadline is None
    assert request.id


async def test_ignore_eos_leaves_only_the_callers_stop_tokens(generation):
    request = await generation.accept("a", SamplingParams(ignore_eos=True, stop_tokens=(5,)))
    assert request.stop_tokens == {5}


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1, 0])
async def test_any_seed_of_64_bits_is_taken(generation, seed):
    request = await generation.accept("a", SamplingParams(seed=seed))
    assert 0 <= request.seed < 2**31


async def test_a_stream_is_the_tokens_then_one_end(generation):
    items = await collect(generation, "a", SamplingParams(max_tokens=3))
    assert [i.token_ids for i in items[:-1]] == [(98,), (99,), (100,)]
    assert [i.index for i in items[:-1]] == [0, 1, 2]
    assert text(items) == "bcd"
    end = items[-1]
    assert (end.reason, end.prompt_tokens, end.completion_tokens, end.epochs) == ("length", 1, 3, (0,))


async def test_half_a_character_is_shown_only_when_nothing_follows(generation, backend):
    backend.reply = list("é".encode())
    items = await collect(generation, "a", SamplingParams(max_tokens=1))
    assert [i.text for i in items[:-1]] == ["", "\ufffd"]
    assert items[1].token_ids == ()


async def test_a_stop_token_is_counted_but_has_no_text(generation, backend):
    backend.reply = [*b"hi", 5, *b"more"]
    items = await collect(generation, "a", SamplingParams(stop_tokens=(5,)))
    assert text(items) == "hi"
    assert (items[-1].reason, items[-1].matched, items[-1].completion_tokens) == ("stop", 5, 3)
    assert list(backend.ended.values()) == ["stop"]


async def test_a_stop_string_ends_the_text_before_it_and_the_request(generation, backend):
    backend.reply = list(b"one two three")
    items = await collect(generation, "a", SamplingParams(stop=("two", "zzz")))
    assert text(items) == "one "
    assert (items[-1].reason, items[-1].matched, items[-1].completion_tokens) == ("stop", "two", 7)
    assert list(backend.ended.values()) == ["left"]
    assert backend.running == 0


async def test_what_was_held_back_for_a_stop_string_comes_at_the_end(generation, backend):
    backend.reply = list(b"one tw")
    assert text(await collect(generation, "a", SamplingParams(stop=("two",)))) == "one tw"


async def test_leaving_the_stream_cancels_the_request(generation, backend):
    request = await generation.accept("a", DEFAULT)
    async with contextlib.aclosing(generation.stream(request)) as items:
        await anext(items)
        assert backend.running == 1
    assert backend.running == 0
    assert backend.ended[request.id] == "left"


async def test_an_abort_is_an_error_and_not_an_end(generation, backend):
    request = await generation.accept("a", DEFAULT)
    items = generation.stream(request)
    await anext(items)
    assert backend.abort(request.id)
    with pytest.raises(Cancelled, match="was aborted after"):
        async for _ in items:
            pass


async def test_a_deadline_is_an_error(generation, backend):
    backend.delay_s = 0.01
    with pytest.raises(DeadlineExceeded, match="the deadline passed after"):
        await collect(generation, "a", timeout_s=0.03)


async def test_epochs_are_those_that_made_tokens(generation, backend):
    request = await generation.accept("a", SamplingParams(max_tokens=4))
    items = []
    async for item in generation.stream(request):
        items.append(item)
        if len(items) == 2:
            await backend.lose(1)
    assert [i.epoch for i in items[:-1]] == [0, 0, 1, 1]
    assert isinstance(items[-1], Complete)
    assert items[-1].epochs == (0, 1)
    assert text(items) == "bcde"


@pytest.mark.parametrize("error", [QueueFull("full"), NoCapacity("none"), Internal("broken")])
async def test_errors_of_the_backend_pass_through(generation, backend, error):
    backend.fail_at = {2: error}
    with pytest.raises(type(error)):
        await collect(generation, "a")
    assert backend.running == 0


async def test_a_backend_that_ends_without_a_reason_is_a_defect(generation, backend):
    async def silent(request):
        return
        yield

    backend.stream = silent
    with pytest.raises(Internal, match="ended without a reason"):
        await collect(generation, "a")
