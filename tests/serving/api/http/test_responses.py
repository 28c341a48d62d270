"""OpenAI's Responses API through its official client: text, streams, tools, going on, coming back, cancel, delete."""

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from serving.errors import NoCapacity
from simulation.byte_tokenizer import byte_tokenizer
from tests.support.fake_backend import FakeBackend
from tests.support.fake_server import serve
from tests.support.tool_prompts import CALL, WITH_TOOLS
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

TOOLS: list[Any] = [{"type": "function", "name": "add", "parameters": {"type": "object", "properties": {}}}]


@contextlib.asynccontextmanager
async def client(backend: FakeBackend, template: str | None = None) -> AsyncIterator[Any]:
    async with serve(backend) as server:
        if template is not None:
            server.processor.tokenizer = byte_tokenizer(template)
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
            yield made


@pytest.fixture
def backend() -> FakeBackend:
    made = FakeBackend(reply=list(b"hello"))
    made.resumable = True
    return made


def prompt(backend: FakeBackend) -> str:
    return byte_tokenizer().decode(backend.requests[-1].prompt)


def decoded(text: str) -> str:
    return byte_tokenizer().decode(byte_tokenizer().encode(text))


async def test_a_response_has_text_usage_and_what_was_asked(backend):
    backend.cached_tokens = 2
    async with client(backend) as c:
        made = await c.responses.create(input="hi", instructions="Be brief.", metadata={"a": "b"}, temperature=0.5)
        stopped = await c.responses.create(input="hi", extra_body={"stop": ["lo"]})
        cut = await c.responses.create(input=[{"role": "user", "content": "hi"}], max_output_tokens=2)
    assert (made.output_text, made.status, made.model, made.object) == ("hello", "completed", "fake", "response")
    assert (made.instructions, made.metadata, made.temperature) == ("Be brief.", {"a": "b"}, 0.5)
    assert (made.usage.input_tokens, made.usage.output_tokens) == (len(backend.requests[0].prompt), 5)
    assert stopped.usage.input_tokens_details.cached_tokens == 2
    assert (stopped.output_text, stopped.status) == ("hel", "completed")
    assert made.id == backend.requests[0].id
    assert (cut.output_text, cut.status, cut.incomplete_details.reason) == ("he", "incomplete", "max_output_tokens")
    assert cut.output[0].status == "incomplete"


async def test_a_stream_is_numbered_and_adds_up_to_the_response(backend):
    async with client(backend) as c:
        whole = await c.responses.create(input="hi")
        events = [event async for event in await c.responses.create(input="hi", stream=True)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 5,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "hello"
    own = {"id", "created_at", "output"}
    assert events[-1].response.model_dump(exclude=own) == whole.model_dump(exclude=own)
    assert events[-1].response.output_text == "hello"
    assert not events[0].response.output


async def test_reasoning_and_logprobs_are_parts_of_the_output(backend):
    async with client(backend) as c:
        made = await c.responses.create(input="hi", include=["message.output_text.logprobs"], top_logprobs=1)
    assert [entry.token for entry in made.output[0].content[0].logprobs] == list("hello")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_function_is_called_and_its_output_goes_back(backend, stream):
    backend.reply = list(CALL.encode())
    async with client(backend, WITH_TOOLS) as c:
        if stream:
            async with c.responses.stream(input="hi", tools=TOOLS, model="fake") as events:
                made = await events.get_final_response()
        else:
            made = await c.responses.create(input="hi", tools=TOOLS)
        message, call = made.output
        assert (message.content[0].text, call.type, call.name) == ("Sure.", "function_call", "add")
        assert json.loads(call.arguments) == {"x": 1}
        output = {"type": "function_call_output", "call_id": call.call_id, "output": "two"}
        wanted = '[add]<|user|>hi<|assistant|>Sure.{"x": 1}<|tool|>two<|assistant|>'
        items = [{"role": "user", "content": "hi"}, *(item.model_dump() for item in made.output), output]
        for again in ({"input": items}, {"input": [output], "previous_response_id": made.id}):
            await c.responses.create(**again, tools=TOOLS)
            assert prompt(backend).replace("\n", "") == decoded(wanted)


async def test_a_response_goes_on_from_an_earlier_one_without_its_instructions(backend):
    async with client(backend) as c:
        first = await c.responses.create(input="hi", instructions="Be brief.")
        second = await c.responses.create(input="and", previous_response_id=first.id)
        assert second.previous_response_id == first.id
        await c.responses.create(input="x", previous_response_id=second.id)
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
        turns += [{"role": "user", "content": "and"}, {"role": "assistant", "content": "hello"}]
        await c.responses.create(input=[*turns, {"role": "user", "content": "x"}])
        assert backend.requests[-1].prompt == backend.requests[-2].prompt
        hidden = await c.responses.create(input="hi", store=False)
        for unknown in ("resp_x", hidden.id):
            with pytest.raises(openai.NotFoundError):
                await c.responses.create(input="x", previous_response_id=unknown)


async def test_a_stream_comes_back_after_any_of_its_events(backend):
    async with client(backend) as c:
        events = [event async for event in await c.responses.create(input="hi", stream=True)]
        response_id = events[0].response.id
        for after in (0, 5, len(events) - 2):
            rest = await c.responses.retrieve(response_id, stream=True, starting_after=after)
            assert [event async for event in rest] == events[after + 1 :]
        assert await c.responses.retrieve(response_id) == events[-1].response


async def test_a_response_in_the_background_runs_without_its_client_and_can_be_cancelled(backend):
    backend.delay_s = 0.002
    async with client(backend) as c:
        made = await c.responses.create(input="hi", background=True)
        assert made.status == "queued"
        events = [event async for event in await c.responses.retrieve(made.id, stream=True)]
        assert events[-1].response.output_text == "hello"
        backend.reply = list(b"x" * 200)
        made = await c.responses.create(input="hi", background=True)
        await until(lambda: len(backend.sent.get(made.id, ())) > 3)
        seen = await c.responses.retrieve(made.id)
        assert (seen.status, set(seen.output_text)) == ("in_progress", {"x"})
        with pytest.raises(openai.BadRequestError, match="in_progress"):
            await c.responses.create(input="x", previous_response_id=made.id)
        cancelled = await c.responses.cancel(made.id)
        assert cancelled.status == "cancelled"
        assert 3 <= len(cancelled.output_text) < 200
        await until(lambda: backend.running == 0)


async def test_a_deleted_response_is_gone(backend):
    async with client(backend) as c:
        made = await c.responses.create(input="hi")
        await c.responses.delete(made.id)
        with pytest.raises(openai.NotFoundError):
            await c.responses.retrieve(made.id)


async def test_errors_name_the_field_and_a_late_one_is_the_last_event(backend):
    async with client(backend) as c:
        for change, field in (
            ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
            ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
            ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
            ({"conversation": "c"}, "conversation"),
            ({"background": True, "store": False}, "store"),
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                await c.responses.create(**{"input": "hi"} | change)
            assert caught.value.param == field
        backend.fail_at = {2: NoCapacity("no rank is left.")}
        events = [event async for event in await c.responses.create(input="hi", stream=True)]
        assert (events[-1].type, events[-1].response.status) == ("response.failed", "failed")
        assert "no rank is left" in events[-1].response.error.message
        assert events[-1].response.output_text == "he"
        backend.resumable = False
        with pytest.raises(openai.BadRequestError, match="journal"):
            await c.responses.create(input="hi", background=True)


async def test_the_form_of_the_answer_is_that_of_chat_completions(backend):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form = {"type": "json_schema", "name": "n", "schema": schema}
    async with client(backend) as c:
        made = await c.responses.create(input="hi", text={"format": form}, max_output_tokens=1)
        asked = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        await c.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "hi"}], response_format=asked, max_tokens=1
        )
    assert made.text.format.type == "json_schema"
    first, second = (request.sampling.structured_outputs for request in backend.requests)
    assert first == second is not None


async def test_the_stream_of_another_api_is_no_response(backend):
    async with serve(backend) as server, httpx.AsyncClient(base_url=server.url) as c:
        made = (await c.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})).json()
        assert (await c.get(f"/v1/responses/{made['id']}")).status_code == 404
        response = (await c.post("/v1/responses", json={"input": "hi"})).json()
        again = (await c.get("/v1/resume", headers={"Last-Event-ID": response["id"]})).text
        assert again.count("event: response.completed") == 1
        bad = await c.get(f"/v1/responses/{response['id']}?stream=true&starting_after=x")
        assert bad.json()["error"]["param"] == "starting_after"


async def test_speculation_is_chosen_by_the_request(backend):
    async with client(backend) as c:
        for given in (True, False, None):
            await c.responses.create(input="hi", extra_body={"speculate": given})
        with pytest.raises(openai.BadRequestError, match="speculate"):
            await c.responses.create(input="hi", extra_body={"speculate": 3})
    assert [request.sampling.speculate for request in backend.requests] == [True, False, None]


async def test_what_chat_completions_add_is_added_here_too(backend):
    more = {
        "top_k": 3, "min_p": 0.1, "frequency_penalty": 0.5, "presence_penalty": 0.25, "repetition_penalty": 1.5,
        "min_tokens": 2, "ignore_eos": True, "stop_token_ids": [7], "seed": 5, "priority": 2,
    }  # fmt: skip
    async with client(backend) as c:
        made = await c.responses.with_raw_response.create(input="hi", max_output_tokens=4, extra_body=more)
    assert "x-moejax-ignored-fields" not in made.headers
    sampling = backend.requests[-1].sampling
    for name in more.keys() - {"stop_token_ids", "ignore_eos"}:
        assert getattr(sampling, name) == more[name], name
    assert sampling.stop_tokens == {7}  # and not those of the model, which `ignore_eos` takes away
