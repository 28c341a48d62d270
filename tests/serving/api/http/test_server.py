"""The HTTP surface with the official OpenAI client, with raw bodies, and with clients that misbehave."""

import asyncio
import contextlib
import dataclasses
import json
import socket

import httpx
import openai
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from serving.api.http.server import start_http
from serving.config import Settings
from serving.errors import Internal, StartError
from serving.observability.history import Sample
from tests.support.fake_backend import MODEL, FakeBackend
from tests.support.fake_server import serve
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

DOCS = ("/docs", "/docs.js", "/docs.css")
USER = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


@contextlib.asynccontextmanager
async def openai_client(backend: FakeBackend):
    async with serve(backend) as server:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        async with client:
            yield client


@contextlib.asynccontextmanager
async def plain_client(backend: FakeBackend):
    async with serve(backend) as server, httpx.AsyncClient(base_url=server.url, timeout=20) as client:
        yield client


def events(text: str) -> list[str]:
    return [frame.removeprefix("data: ") for frame in text.split("\n\n") if frame]


async def test_a_completion(backend):
    async with openai_client(backend) as client:
        answer = await client.completions.create(model="fake", prompt="a", max_tokens=3, temperature=0)
    assert answer.choices[0].text == "bcd"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == 4


async def test_a_prompt_of_token_ids(backend):
    async with openai_client(backend) as client:
        answer = await client.completions.create(model="fake", prompt=[97, 98], max_tokens=1)
    assert answer.choices[0].text == "c"
    assert backend.requests[0].prompt == (97, 98)


async def test_a_chat(backend):
    backend.reply = list("héllo 🎉".encode())
    async with openai_client(backend) as client:
        answer = await client.chat.completions.create(model="fake", messages=USER)
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", "héllo 🎉")
    assert answer.choices[0].finish_reason == "stop"


async def test_content_may_be_a_list_of_text_parts_and_the_role_developer(backend):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    messages = [{"role": "developer", "content": "s"}, {"role": "user", "content": parts}]
    async with openai_client(backend) as client:
        await client.chat.completions.create(model="fake", messages=messages, max_completion_tokens=1)
    assert backend.requests[0].prompt == (259, *b"s", 256, 258, *b"hi", 256, 260)
    assert backend.requests[0].sampling.max_tokens == 1


async def test_a_streamed_chat_is_the_same_text_with_usage_last(backend):
    backend.reply = list("héllo wörld 🎉".encode())
    async with openai_client(backend) as client:
        stream = await client.chat.completions.create(
            model="fake", messages=USER, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == "héllo wörld 🎉"
    assert not any("\ufffd" in piece for piece in pieces)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == len(backend.reply)
    assert len({c.id for c in chunks}) == 1


async def test_a_streamed_completion_ends_with_done(backend):
    async with plain_client(backend) as client:
        answer = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2, "stream": True})
    frames = events(answer.text)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert [json.loads(f)["choices"][0]["text"] for f in frames[:-1]] == ["b", "c", ""]
    assert frames[-1] == "[DONE]"


async def test_stop_strings_end_the_text_before_them(backend):
    backend.reply = list(b"one two three")
    async with openai_client(backend) as client:
        for stop in ("two", ["two", "xyz"]):
            answer = await client.completions.create(model="fake", prompt="a", stop=stop)
            assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("one ", "stop")


async def test_logprobs_of_the_chosen_tokens(backend):
    backend.reply = list("aé".encode())
    async with openai_client(backend) as client:
        chat = await client.chat.completions.create(model="fake", messages=USER, logprobs=True)
        plain = await client.completions.create(model="fake", prompt="a", logprobs=0)
    content = chat.choices[0].logprobs.content
    assert [(c.token, c.logprob, c.bytes) for c in content] == [
        ("a", -0.5, [97]),
        ("\ufffd", -0.5, [0xC3]),
        ("\ufffd", -0.5, [0xA9]),
    ]
    assert plain.choices[0].logprobs.token_logprobs == [-0.5] * 3
    assert plain.choices[0].logprobs.text_offset == [0, 1, 1]


async def test_fields_that_change_nothing_are_taken(backend):
    async with openai_client(backend) as client:
        await client.chat.completions.create(
            model="fake", messages=USER, user="u", metadata={"a": "b"}, n=1, presence_penalty=0, store=False,
            logit_bias={}, response_format={"type": "text"}, max_tokens=1, tool_choice="none", seed=3,
        )  # fmt: skip
    assert backend.requests[0].sampling.seed == 3


REFUSED = [
    ({"prompt": "x", "n": 0}, "n", "n is 0; it must be between 1 and 128"),
    ({"prompt": "x", "n": True}, "n", "it must be an integer"),
    ({"prompt": ["x"] * 70, "n": 2}, "n", "are 140 answers; a call has at most 128"),
    ({"prompt": ["x"] * 129}, "prompt", "are 129 answers; a call has at most 128"),
    ({"prompt": "x", "best_of": 3}, "best_of", "best_of is 3 and n is 1"),
    ({"prompt": "x", "logit_bias": {"300": 1}}, "logit_bias", "token 0 is 300"),
    ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias", "has a name that is not an integer"),
    ({"prompt": "x", "logit_bias": {"5": "a"}}, "logit_bias", "a value of logit_bias must be a number"),
    ({"prompt": "x", "logit_bias": {"5": 101}}, "logit_bias", "the bias of token 5 is 101"),
    ({"prompt": "x", "presence_penalty": 2.5}, "presence_penalty", "presence_penalty is 2.5"),
    ({"prompt": "x", "frequency_penalty": -3}, "frequency_penalty", "frequency_penalty is -3"),
    ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty", "repetition_penalty is 0"),
    ({"prompt": "x", "min_tokens": 5, "max_tokens": 2}, "min_tokens", "min_tokens is 5 and max_tokens 2"),
    ({"prompt": "x", "logprobs": 21}, "logprobs", "logprobs is 21; it must be between 0 and 20"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens", "max_tokens is 0"),
    ({"prompt": "x", "prompt_logprobs": 21}, "prompt_logprobs", "prompt_logprobs is 21"),
    ({"prompt": "x", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "are not streamed"),
    ({"prompt": "x", "regex": "("}, "regex", "the constraint cannot be used"),
    ({"prompt": "x", "choice": []}, "choice", "must be a list of texts"),
    ({"prompt": "x", "choice": ["a"], "regex": "b"}, "choice", "2 constraints (regex, choice); send one of them"),
    ({"prompt": "x", "choice": ["a"], "ignore_eos": True}, "ignore_eos", "takes away the stop token"),
    ({"prompt": "x", "response_format": {"type": "xml"}}, "response_format", "response_format must be"),
    ({"prompt": "x", "structured_outputs": {"json": 5}}, "structured_outputs.json", "must be text or an object"),
    ({"prompt": "x", "temperature": "hot"}, "temperature", "it must be a number"),
    ({"prompt": "x", "temperature": True}, "temperature", "it must be a number"),
    ({"prompt": "x", "max_tokens": 1.5}, "max_tokens", "it must be an integer"),
    ({"prompt": "x", "max_tokens": -2}, "max_tokens", "max_tokens is -2"),
    ({"prompt": "x", "max_tokens": 10**30}, "max_tokens", "it must be between 1"),
    ({"prompt": "x", "temperature": 10**400}, "temperature", "number out of range"),
    ({"prompt": "x", "top_k": -2}, "top_k", "top_k is -2"),
    ({"prompt": "x", "stop": [1]}, "stop[0]", "it must be text"),
    ({"prompt": "x", "stop": ""}, "stop", "has 0 characters"),
    ({"prompt": "x", "stop_token_ids": ["a"]}, "stop_token_ids[0]", "it must be an integer"),
    ({"prompt": "x", "stream": "yes"}, "stream", "it must be true or false"),
    ({"prompt": "x", "stream": True, "stream_options": []}, "stream_options", "must be an object"),
    ({"prompt": ["a", 5]}, "prompt[1]", "must be text or a list of token ids, or a list of either"),
    ({"prompt": 5}, "prompt", "it must be text or a list"),
    ({"prompt": [1.5]}, "prompt[0]", "prompt[0] is a number (1.5); it must be"),
    ({"prompt": []}, "prompt", "the prompt is empty"),
    ({"prompt": [-1]}, "prompt", "token 0 is -1"),
    ({"prompt": "\ud800"}, None, "surrogate"),
    ({"prompt": "x", "\ud800": 1}, None, "surrogate"),
    ({"prompt": "x", "skip_special_tokens": False}, "skip_special_tokens", "special tokens have no text"),
    ({"prompt": "x", "suffix": "y"}, "suffix", "Leave it out"),
    ({"prompt": "x", "use_beam_search": 0}, "use_beam_search", "is 0 is not supported"),
    ({"prompt": None}, "prompt", "prompt is missing"),
    ({}, "prompt", "prompt is missing"),
    ([], None, "it must be a JSON object"),
    ("x", None, "it must be a JSON object"),
]


@pytest.mark.parametrize(("body", "param", "message"), REFUSED)
async def test_a_bad_completion_is_refused_by_name(backend, body, param, message):
    async with plain_client(backend) as client:
        answer = await client.post("/v1/completions", content=json.dumps(body))
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] == param
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert backend.requests == []


REFUSED_CHATS = [
    ({"messages": []}, "messages", "there are no messages"),
    ({}, "messages", "messages is missing"),
    ({"messages": "hi"}, "messages", "it must be a list"),
    ({"messages": ["hi"]}, "messages[0]", "it must be an object"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "role is missing"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "content is missing"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "role 'robot'"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0]",
        "text only",
    ),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls[0]", "must be"),
    ({"messages": USER, "tools": [{"type": "function"}]}, "tools[0].function", "is missing"),
    ({"messages": USER, "tools": TOOLS}, "tools", "has no place for tools"),
    ({"messages": USER, "tool_choice": "required"}, "tool_choice", "tool_choice must be"),
    ({"messages": USER, "top_logprobs": 3}, "top_logprobs", "only for logprobs: true"),
    ({"messages": USER, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs is 21"),
    ({"messages": USER, "response_format": {"type": "json_schema"}}, "response_format", "must be"),
    ({"messages": [{"role": "user", "content": "x", "audio": {"id": "a"}}]}, "messages[0].audio", "text only"),
    ({"messages": USER, "audio": {"voice": "v"}}, "audio", "text only"),
]


@pytest.mark.parametrize(("body", "param", "message"), REFUSED_CHATS)
async def test_a_bad_chat_is_refused_by_name(backend, body, param, message):
    async with plain_client(backend) as client:
        answer = await client.post("/v1/chat/completions", content=json.dumps(body))
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"prompt": NaN}', "NaN is not a JSON number"),
        (b'{"prompt": "\xff"}', "not valid UTF-8: invalid start byte at byte 12"),
        (b'{"seed": 1' + b"0" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
async def test_a_body_that_is_not_json_is_refused(backend, content, message):
    async with plain_client(backend) as client:
        answer = await client.post("/v1/completions", content=content)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


async def test_a_body_that_is_too_long_is_413(backend):
    async with plain_client(backend) as client:
        answer = await client.post("/v1/completions", content=b" " * (Settings().max_body_bytes + 1))
    assert answer.status_code == 413
    assert str(Settings().max_body_bytes) in answer.json()["error"]["message"]


async def test_errors_arrive_as_the_openai_clients_classes(backend):
    async with openai_client(backend) as client:
        with pytest.raises(openai.BadRequestError, match="has 256 tokens") as caught:
            await client.completions.create(model="fake", prompt="x" * 256)
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError, match="this server has 'fake'"):
            await client.completions.create(model="gpt-9", prompt="x")
        backend.max_queue = 0
        with pytest.raises(openai.RateLimitError) as limited:
            await client.completions.create(model="fake", prompt="x", stream=True)
        assert limited.value.response.headers["retry-after"] == "2"


async def test_no_capacity_is_503_with_retry_after(backend):
    backend.dead = {0, 1, 2, 3}
    async with plain_client(backend) as client:
        answer = await client.post("/v1/completions", json={"prompt": "x", "stream": True})
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "2"


async def test_an_error_in_a_stream_is_an_event_and_the_stream_ends(backend):
    backend.fail_at = {2: Internal("broken")}
    async with openai_client(backend) as client:
        stream = await client.completions.create(model="fake", prompt="a", stream=True)
        with pytest.raises(openai.APIError, match="broken"):
            _ = [chunk async for chunk in stream]


async def test_a_defect_is_500_without_its_text(backend):
    def broken() -> None:
        raise RuntimeError("a secret path")

    async with plain_client(backend) as client:
        backend.status = broken
        answer = await client.get("/fault_tolerance/status")
    assert answer.status_code == 500
    assert "secret" not in answer.text


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_vanishes_ends_its_request(backend, stream):
    backend.delay_s = 0.02
    async with serve(backend) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
        body = json.dumps({"prompt": "a", "stream": stream}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        if stream:
            await reader.readuntil(b"data: ")
        await until(lambda: backend.running == 1)
        writer.close()
        await until(lambda: not backend.running)
    assert list(backend.ended.values()) == ["left"]


async def test_a_client_that_never_reads_is_held_back_and_hurts_nobody():
    backend = FakeBackend(model=dataclasses.replace(MODEL, max_context=60_000, stop_tokens=()))
    async with serve(backend) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.http_port, limit=1 << 10)
        body = b'{"prompt": "a", "stream": true}'
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await until(lambda: backend.running == 1)
        before = -1
        while backend.status().tokens != before:  # until TCP flow control holds it
            before = backend.status().tokens
            await asyncio.sleep(0.4)
        assert 0 < before < 59_000
        async with httpx.AsyncClient(base_url=server.url) as client:
            other = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
        assert other.json()["choices"][0]["text"] == "bc"
        writer.close()
        await until(lambda: not backend.running)
        del reader


async def test_live_stays_and_health_goes_with_the_last_rank(backend):
    async with plain_client(backend) as client:
        assert (await client.get("/health")).status_code == 200
        backend.dead = {0, 1, 2, 3}
        unready = await client.get("/health")
        assert (unready.status_code, unready.headers["retry-after"]) == (503, "1")
        assert (await client.get("/live")).status_code == 200


async def test_models_version_and_status(backend):
    async with openai_client(backend) as client:
        models = (await client.models.list()).data
        assert [m.id for m in models] == ["fake"]
        assert (await client.models.retrieve("fake")).max_model_len == 256
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("other")
    async with plain_client(backend) as client:
        assert (await client.get("/version")).json()["version"]
        status = (await client.get("/fault_tolerance/status")).json()
    assert [r["state"] for r in status["ranks"]] == ["serving"] * 4
    assert status["model"]["name"] == "fake"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nope", 404), ("GET", "/v1/nope", 404), ("GET", "/v1/completions", 405), ("GET", "/../x", 404)],
)
async def test_a_route_that_is_none_is_refused_in_openais_shape(backend, method, path, status):
    async with plain_client(backend) as client:
        answer = await client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_the_request_id_comes_back(backend):
    async with plain_client(backend) as client:
        body = {"prompt": "a", "max_tokens": 1}
        given_id = await client.post("/v1/completions", json=body, headers={"X-Request-Id": "mine"})
        own = await client.post("/v1/completions", json=body)
    assert given_id.headers["x-request-id"] == "mine"
    assert own.headers["x-request-id"] == own.json()["id"]


async def test_events_are_streamed_and_go_on_after_the_last_id(backend):
    await backend.emit("ready")
    await backend.lose(1)
    async with plain_client(backend) as client:
        headers = {"Last-Event-ID": "1"}
        async with client.stream("GET", "/fault_tolerance/events", headers=headers) as answer:
            lines = answer.aiter_lines()
            data = [json.loads(line[6:]) async for line in _take_data(lines, 2)]
        refused = await client.get("/fault_tolerance/events?after=x")
    assert [e["kind"] for e in data] == ["rank_lost", "recovered"]
    assert refused.status_code == 400


async def test_the_history_has_a_sample_for_each_second_by_field(backend):
    async with plain_client(backend) as client:
        seconds = await client.get("/fault_tolerance/history")
        minutes = await client.get("/fault_tolerance/history?by=minute")
        refused = await client.get("/fault_tolerance/history?by=hour")
    assert seconds.json().keys() == minutes.json().keys() == {field.name for field in dataclasses.fields(Sample)}
    assert refused.status_code == 400
    assert "by is 'hour'; it must be second or minute" in refused.json()["error"]["message"]


async def _take_data(lines, count):
    async for line in lines:
        if line.startswith("data: "):
            yield line
            count -= 1
            if not count:
                return


async def test_kill_needs_chaos_and_json(backend):
    async with plain_client(backend) as client:
        form = await client.post("/fault_tolerance/kill", content='{"rank": 1}', headers={"Content-Type": "text/plain"})
        wrong = await client.post("/fault_tolerance/kill", json={"rank": 1, "signal": "SIGTERM"})
        unknown = await client.post("/fault_tolerance/kill", json={"rank": 9})
        shape = await client.post("/fault_tolerance/kill", json={"rank": True})
        killed = await client.post("/fault_tolerance/kill", json={"rank": 1, "signal": "SIGSTOP"})
        backend.chaos = False
        denied = await client.post("/fault_tolerance/kill", json={"rank": 2})
    answers = (form, wrong, unknown, shape, killed, denied)
    assert [a.status_code for a in answers] == [415, 400, 404, 400, 200, 403]
    assert backend.killed == [(1, "SIGSTOP")]


async def test_the_dashboard_asks_for_nothing_from_elsewhere(backend):
    async with plain_client(backend) as client:
        pages = [await client.get(p) for p in ("/", "/dashboard.css", "/dashboard.js", "/icon.svg", *DOCS)]
    assert {p.status_code for p in pages} == {200}
    assert "default-src 'self'" in pages[0].headers["content-security-policy"]
    outside = [p.text.replace("http://www.w3.org/2000/svg", "") for p in pages]
    assert not any("http://" in text or "https://" in text for text in outside)


async def test_a_server_that_stops_does_not_wait_for_watches(processor):
    server = await start_http(processor)
    client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}")
    async with client, client.stream("GET", "/fault_tolerance/events") as answer:
        assert await anext(answer.aiter_lines()) == ": watching"
        async with asyncio.timeout(20):
            await server.stop(60)


async def test_a_kept_connection_of_a_server_that_stops_can_have_one_more_request_and_is_then_closed(processor):
    server = await start_http(processor)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
    first = await reader.readuntil(b"\r\n\r\n")
    assert b"connection: close" not in first.lower()
    await reader.readexactly(int(first.lower().split(b"content-length: ")[1].split()[0]))
    stopping = asyncio.create_task(server.stop(20, linger_s=20))
    await until(lambda: not any(each.is_serving() for each in server._server.servers))
    with pytest.raises(ConnectionError):
        await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
    async with asyncio.timeout(15):
        rest = await reader.read()
        await stopping
    assert b"200 OK" in rest
    assert b"connection: close" in rest.lower()
    writer.close()


async def test_so_can_the_connection_of_a_stream_that_ends_long_after_the_server_began_to_stop(backend, processor):
    """Its headers were sent before, and say that the connection is kept."""
    server, backend.delay_s = await start_http(processor), 0.002
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    body = json.dumps({"prompt": "a", "max_tokens": 99, "stream": True}).encode()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
    writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
    headers = await reader.readuntil(b"\r\n\r\n")
    backend.may_answer.clear()
    assert b"connection: close" not in headers.lower()
    linger_s = 0.5
    stopping = asyncio.create_task(server.stop(60, linger_s=linger_s))
    await asyncio.sleep(2 * linger_s)
    backend.may_answer.set()
    async with asyncio.timeout(15):
        await reader.readuntil(b"\r\n0\r\n\r\n")
        await asyncio.sleep(linger_s / 5)
        writer.write(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
        rest = await reader.read()
        await stopping
    assert b"200 OK" in rest
    assert b"connection: close" in rest.lower()
    writer.close()


async def test_an_accepted_connection_sends_each_event_at_once(processor):
    server = await start_http(processor)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    await until(lambda: server._server.server_state.connections)
    (connection,) = server._server.server_state.connections
    accepted = connection.transport.get_extra_info("socket")
    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    writer.close()
    await server.stop()
    del reader


async def test_a_taken_port_is_a_clear_error(processor):
    server = await start_http(processor)
    with pytest.raises(StartError, match=rf"HTTP cannot listen on 127\.0\.0\.1:{server.port}"):
        await start_http(processor, port=server.port)
    await server.stop()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [
        "prompt",
        "messages",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
        "stop_token_ids",
        "stream",
        "stream_options",
        "logprobs",
        "model",
        *("echo", "user", "n", "best_of", "tools", "tool_choice", "logit_bias", "regex", "choice", "response_format"),
        *("min_tokens", "frequency_penalty", "repetition_penalty", "prompt_logprobs", "top_logprobs", "priority"),
        "x",
    ]
)


@given(bodies=st.lists(st.dictionaries(NAMES, JSON, max_size=5), min_size=20, max_size=20), chat=st.booleans())
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
def test_any_json_ends_in_an_answer_or_a_refusal(bodies, chat):
    async def run() -> None:
        backend = FakeBackend()
        async with plain_client(backend) as client:
            path = "/v1/chat/completions" if chat else "/v1/completions"
            for body in bodies:
                answer = await client.post(path, content=json.dumps({"prompt": "x", "max_tokens": 1} | body))
                assert answer.status_code in (200, 400, 404), body
        assert backend.running == 0

    asyncio.run(run())
