"""Anthropic's messages through its official client: text, streams, tools, errors, the count of tokens, resumption."""

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx
import pytest

from serving.auth.api_keys import ApiKeyFile
from serving.auth.limits import CallLimits
from serving.config import Settings
from serving.errors import NoCapacity
from simulation.byte_tokenizer import byte_tokenizer
from tests.support.fake_backend import FakeBackend
from tests.support.fake_server import serve
from tests.support.tool_prompts import CALL, WITH_TOOLS

pytestmark = pytest.mark.anyio

USER: list[Any] = [{"role": "user", "content": "hi"}]
TOOLS: list[Any] = [{"name": "add", "input_schema": {"type": "object", "properties": {}}}]
ASK: dict[str, Any] = {"model": "fake", "max_tokens": 9, "messages": USER}


@contextlib.asynccontextmanager
async def client(backend: FakeBackend, template: str | None = None) -> AsyncIterator[Any]:
    async with serve(backend) as server:
        if template is not None:
            server.processor.tokenizer = byte_tokenizer(template)
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as made:
            yield made


def prompt(backend: FakeBackend) -> str:
    return byte_tokenizer().decode(backend.requests[-1].prompt)


async def test_a_message_has_text_usage_and_the_reason_of_its_end(backend):
    backend.reply, backend.cached_tokens = list(b"hello"), 3
    async with client(backend) as c:
        message = await c.messages.create(**ASK, system=[{"type": "text", "text": "Be brief."}])
        cut = await c.messages.create(**ASK | {"max_tokens": 2})
        stopped = await c.messages.create(**ASK, stop_sequences=["ll"])
    assert (message.content[0].text, message.stop_reason, message.stop_sequence) == ("hello", "end_turn", None)
    assert (message.role, message.type, message.model) == ("assistant", "message", "fake")
    read = message.usage.input_tokens + message.usage.cache_read_input_tokens
    assert (read, message.usage.output_tokens) == (len(backend.requests[0].prompt), 5)
    assert message.id == backend.requests[0].id == message._request_id
    assert backend.requests[0].prompt != backend.requests[1].prompt
    assert (cut.content[0].text, cut.stop_reason) == ("he", "max_tokens")
    assert (stopped.content[0].text, stopped.stop_reason, stopped.stop_sequence) == ("he", "stop_sequence", "ll")


async def test_a_stream_adds_up_to_the_message(backend):
    backend.reply = list("é!".encode())
    async with client(backend) as c:
        whole = await c.messages.create(**ASK)
        async with c.messages.stream(**ASK) as stream:
            kinds = [event.type async for event in stream]
        summed = await stream.get_final_message()
    assert [kind for kind in kinds if kind != "text"] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert summed.model_dump(exclude={"id", "content"}) == whole.model_dump(exclude={"id", "content"})
    assert [block.text for block in summed.content] == [block.text for block in whole.content] == ["é!"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_tool_is_called_and_its_result_goes_back(backend, stream):
    backend.reply = list(CALL.encode())
    ask: dict[str, Any] = ASK | {"max_tokens": 99, "tools": TOOLS}
    async with client(backend, WITH_TOOLS) as c:
        if stream:
            async with c.messages.stream(**ask) as events:
                message = await events.get_final_message()
        else:
            message = await c.messages.create(**ask)
        text, call = message.content
        assert (text.text, call.type, call.name, call.input) == ("Sure.", "tool_use", "add", {"x": 1})
        assert message.stop_reason == "tool_use"
        result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "two"}]}
        turns = [{"role": "assistant", "content": [text.model_dump(), call.model_dump()]}]
        turns += [{"role": "user", "content": [result, {"type": "text", "text": "and?"}]}]
        await c.messages.create(**ask | {"messages": USER + turns, "tool_choice": {"type": "auto"}})
    wanted = '[add]<|user|>hi<|assistant|>Sure.{"x": 1}<|tool|>two<|user|>and?<|assistant|>'
    assert prompt(backend).replace("\n", "") == byte_tokenizer().decode(byte_tokenizer().encode(wanted))


async def test_errors_have_anthropics_form_and_the_path_of_the_field(backend):
    image = {"type": "image", "source": {"type": "url", "url": "http://server/x"}}
    async with client(backend) as c:
        for change, error, kind, text in (
            ({"model": "other"}, anthropic.NotFoundError, "not_found_error", "other"),
            ({"max_tokens": 9999}, anthropic.BadRequestError, "invalid_request_error", "maximum context length"),
            ({"top_k": "x"}, anthropic.BadRequestError, "invalid_request_error", "top_k"),
            (
                {"messages": [{"role": "user", "content": [image]}]},
                anthropic.BadRequestError,
                "invalid_request_error",
                "messages[0].content[0]",
            ),
            (
                {"messages": [*USER, {"role": "assistant", "content": "x"}]},
                anthropic.BadRequestError,
                "invalid_request_error",
                "messages[1]",
            ),
        ):
            with pytest.raises(error) as caught:
                await c.messages.create(**ASK, extra_body=change)
            body: Any = caught.value.body
            assert body["error"]["type"] == kind
            assert text in body["error"]["message"]
            assert caught.value.request_id == body["request_id"]
        backend.max_queue = 0
        with pytest.raises(anthropic.RateLimitError):
            await c.messages.create(**ASK)


async def test_an_error_in_a_stream_is_its_last_event(backend):
    backend.fail_at = {2: NoCapacity("no rank is left.")}
    async with client(backend) as c:
        stream = await c.messages.create(**ASK, stream=True)
        with pytest.raises(anthropic.APIStatusError, match="no rank is left"):
            _ = [event async for event in stream]


async def test_tokens_are_counted_as_the_message_would_have_them(backend):
    ask: dict[str, Any] = {"model": "fake", "messages": USER, "system": "Be brief."}
    async with client(backend) as c:
        count = await c.messages.count_tokens(**ask)
        message = await c.messages.create(**ask, max_tokens=1)
    assert count.input_tokens == message.usage.input_tokens > 0


async def test_the_key_may_come_as_anthropics_clients_send_it(backend, tmp_path):
    file = ApiKeyFile(tmp_path / "keys")
    secret = file.add("someone")
    limits = CallLimits.of(Settings(api_keys=str(tmp_path / "keys")))
    async with serve(backend, limits=limits) as server:
        for key, works in ((secret, True), ("wrong", False)):
            async with anthropic.AsyncAnthropic(base_url=server.url, api_key=key, max_retries=0) as c:
                with contextlib.nullcontext() if works else pytest.raises(anthropic.AuthenticationError):
                    await c.messages.create(**ASK)


async def test_a_broken_stream_goes_on_after_the_last_event_that_came(backend):
    backend.resumable, backend.reply = True, list(b"abcdef")
    async with serve(backend) as server, httpx.AsyncClient(base_url=server.url) as c:
        ids = {"X-Moejax-Event-Ids": "true"}
        text = (await c.post("/v1/messages", json=ASK | {"stream": True}, headers=ids)).text
        events = [event for event in text.split("\n\n") if event]
        assert all(len(event.splitlines()) == 3 for event in events)
        for position in (0, 3, len(events) - 2):
            last = events[position].splitlines()[2].removeprefix("id: ")
            rest = (await c.get("/v1/resume", headers={"Last-Event-ID": last})).text
            assert rest == "".join(f"{event}\n\n" for event in events[position + 1 :])
    assert len(events) == 11
    assert json.loads(events[0].splitlines()[1].removeprefix("data: "))["message"]["content"] == []


async def test_speculation_is_chosen_by_the_request(backend):
    async with client(backend) as c:
        for given in (True, False, None):
            await c.messages.create(**ASK, extra_body={"speculate": given})
        with pytest.raises(anthropic.BadRequestError, match="speculate"):
            await c.messages.create(**ASK, extra_body={"speculate": "yes"})
    assert [request.sampling.speculate for request in backend.requests] == [True, False, None]
