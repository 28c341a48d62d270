"""The whole surface through the official OpenAI client, synchronous and asynchronous, and through curl."""

import asyncio
import contextlib
import json
import shutil

import httpx
import openai
import pytest

from simulation.byte_tokenizer import byte_tokenizer
from tests.support.fake_backend import FakeBackend
from tests.support.fake_server import serve
from tests.support.tool_prompts import CALL, TOOLS, USER, WITH_TOOLS

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def client(backend: FakeBackend, template: str | None = None):
    async with serve(backend) as server:
        if template is not None:
            server.processor.tokenizer = byte_tokenizer(template)
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
            yield made


async def test_n_answers_have_seeds_of_their_own_and_the_prompt_counts_once(backend):
    backend.cached_tokens = 1
    async with client(backend) as c:
        answer = await c.completions.create(model="fake", prompt="ab", n=3, max_tokens=2, seed=40)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "cd"), (1, "cd"), (2, "cd")]
    assert [request.sampling.seed for request in backend.requests] == [40, 41, 42]
    assert len({request.id for request in backend.requests}) == 3
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 6)


async def test_several_prompts_in_any_form_are_answered_in_order(backend):
    async with client(backend) as c:
        for prompt in (["a", "x"], [[97], [120]], [[97], "x"]):
            answer = await c.completions.create(model="fake", prompt=prompt, n=2, max_tokens=1)
            assert [choice.text for choice in answer.choices] == ["b", "b", "y", "y"]
            assert answer.usage.prompt_tokens == 2


async def test_items_of_several_answers_in_a_stream_have_their_choice(backend):
    backend.delay_s = 0.001
    async with client(backend) as c:
        stream = await c.completions.create(
            model="fake", prompt=["a", "k"], n=2, max_tokens=5, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    texts = {i: "".join(x.text for c in chunks for x in c.choices if x.index == i) for i in range(4)}
    assert texts == {0: "bcdef", 1: "bcdef", 2: "lmnop", 3: "lmnop"}
    assert sum(x.finish_reason == "length" for c in chunks for x in c.choices) == 4
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (2, 20)
    assert backend.running == 0


async def test_an_error_of_one_answer_ends_the_call_and_the_others(backend):
    backend.max_queue = 2
    async with client(backend) as c:
        with pytest.raises(openai.RateLimitError):
            await c.completions.create(model="fake", prompt="a", n=3)
    assert backend.running == 0


async def test_a_prompt_is_scored_as_evaluation_programs_ask(backend):
    async with client(backend) as c:
        answer = await c.completions.create(model="fake", prompt=["abc", [97]], echo=True, max_tokens=0, logprobs=1)
    first, second = answer.choices
    assert (first.text, first.logprobs.tokens, first.logprobs.text_offset) == ("abc", ["a", "b", "c"], [0, 1, 2])
    assert first.logprobs.token_logprobs == [None, -0.25, -0.25]
    assert first.logprobs.top_logprobs == [None, {"b": -0.25}, {"c": -0.25}]
    assert (second.text, second.logprobs.token_logprobs) == ("a", [None])
    assert answer.usage.completion_tokens == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_echo_puts_the_prompt_and_its_log_probabilities_first(backend, stream):
    async with client(backend) as c:
        made = await c.completions.create(model="fake", prompt="ab", echo=True, max_tokens=2, logprobs=2, stream=stream)
        parts = [chunk async for chunk in made] if stream else [made]
    choices = [part.choices[0] for part in parts]
    assert "".join(choice.text for choice in choices) == "abcd"
    told = [x.logprobs for x in choices if x.logprobs]
    assert [p for x in told for p in x.token_logprobs] == [None, -0.25, -0.5, -0.5]
    assert [o for x in told for o in x.text_offset] == [0, 1, 2, 3]
    assert told[-1].top_logprobs[-1] == {"d": -0.5, "\x00": -2.0}


async def test_prompt_logprobs_are_keyed_by_token_id(backend):
    async with client(backend) as c:
        answer = await c.completions.create(model="fake", prompt="ab", max_tokens=1, extra_body={"prompt_logprobs": 1})
    assert answer.choices[0].prompt_logprobs == [None, {"98": {"logprob": -0.25, "rank": 1, "decoded_token": "b"}}]


async def test_top_logprobs_of_a_chat(backend):
    backend.reply = list(b"ok")
    async with client(backend) as c:
        answer = await c.chat.completions.create(model="fake", messages=USER, logprobs=True, top_logprobs=2)
    first = answer.choices[0].logprobs.content[0]
    assert (first.token, first.logprob) == ("o", -0.5)
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("o", -0.5), ("\x00", -2.0)]


async def test_what_bends_the_choice_reaches_the_request(backend):
    async with client(backend) as c:
        await c.chat.completions.create(
            model="fake", messages=USER, max_tokens=3, frequency_penalty=0.5, presence_penalty=-1, logit_bias={"5": 2},
            response_format={"type": "json_object"}, extra_body={"repetition_penalty": 1.2},
        )  # fmt: skip
    request = backend.requests[0]
    assert (
        request.sampling.frequency_penalty,
        request.sampling.presence_penalty,
        request.sampling.repetition_penalty,
    ) == (0.5, -1, 1.2)
    assert (request.sampling.logit_bias, request.sampling.structured_outputs.kind) == (((5, 2),), "json")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_tool_call_of_the_model_is_one_for_the_client(backend, stream):
    backend.reply = list(CALL.encode())
    async with client(backend, WITH_TOOLS) as c:
        made = await c.chat.completions.create(model="fake", messages=USER, tools=TOOLS, stream=stream)
        if stream:
            parts = [chunk.choices[0] async for chunk in made]
            content = "".join(part.delta.content or "" for part in parts)
            calls = [call for part in parts for call in part.delta.tool_calls or []]
            reason = parts[-1].finish_reason
        else:
            message, reason = made.choices[0].message, made.choices[0].finish_reason
            content, calls = message.content, message.tool_calls
    assert (content, reason) == ("Sure.", "tool_calls")
    assert [(call.function.name, call.function.arguments) for call in calls] == [("add", '{"x": 1}')]
    assert backend.requests[0].prompt[:5] == tuple(b"[add]")


async def test_a_conversation_goes_on_after_a_tool_call(backend):
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
    turns = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
    ]
    async with client(backend, WITH_TOOLS) as c:
        await c.chat.completions.create(model="fake", messages=turns, tools=TOOLS, max_tokens=1)
        await c.chat.completions.create(model="fake", messages=turns, tools=TOOLS, tool_choice="none", max_tokens=1)
    text = bytes(token for token in backend.requests[0].prompt if token < 256).decode()
    assert text == '[add]hi{"x": 1}<|tool|>2'
    assert not bytes(token for token in backend.requests[1].prompt if token < 256).startswith(b"[add]")


async def test_the_synchronous_client_streams(backend):
    async with serve(backend) as server:

        def run() -> str:
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as c:
                stream = c.completions.create(model="fake", prompt="a", max_tokens=4, stream=True)
                return "".join(chunk.choices[0].text for chunk in stream)

        assert await asyncio.to_thread(run) == "bcde"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_curl_gets_answers_streams_and_refusals(backend):
    async with serve(backend) as server:

        async def curl(path: str, body: object) -> str:
            arguments = ("-sS", "-N", "-i", "-H", "Content-Type: application/json", "-d", json.dumps(body))
            process = await asyncio.create_subprocess_exec(
                "curl", *arguments, f"{server.url}{path}", stdout=asyncio.subprocess.PIPE
            )
            out, _ = await process.communicate()
            assert process.returncode == 0
            return out.decode()

        whole = await curl("/v1/completions", {"prompt": "a", "max_tokens": 2})
        stream = await curl("/v1/completions", {"prompt": "a", "max_tokens": 2, "stream": True})
        refused = await curl("/v1/completions", {"prompt": "a", "n": 0})
    assert '"text":"bc"' in whole
    assert stream.rstrip().endswith("data: [DONE]")
    assert refused.startswith("HTTP/1.1 400")
    assert all("x-request-id: " in answer for answer in (whole, stream, refused))


async def test_text_becomes_tokens_and_tokens_text(backend):
    async with serve(backend) as server, httpx.AsyncClient(base_url=server.url) as c:
        tokens = (await c.post("/tokenize", json={"prompt": "hé"})).json()
        assert tokens == {"tokens": list("hé".encode()), "count": 3, "max_model_len": 256}
        assert (await c.post("/detokenize", json={"tokens": tokens["tokens"]})).json() == {"prompt": "hé"}
        chat = (await c.post("/tokenize", json={"messages": USER})).json()["tokens"]
        assert chat == [258, *b"hi", 256, 260]
        for path, body in (("/tokenize", {}), ("/detokenize", {"tokens": [300]}), ("/detokenize", {"tokens": "x"})):
            assert (await c.post(path, json=body)).status_code == 400
