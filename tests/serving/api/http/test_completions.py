"""Callers of the endpoints get more than the answer: ids of events, warnings, names, the usage on the way."""

import codecs
import contextlib
import json

import httpx
import pytest

from serving.api.http.server import application
from serving.config import HttpSettings
from serving.text.tokenizer import Tokenizer

pytestmark = pytest.mark.anyio
ASK = {"prompt": "a", "max_tokens": 3}


@contextlib.asynccontextmanager
async def client(processor, **settings):
    app = application(processor, settings=HttpSettings(**settings))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as made:
        yield made


async def test_an_event_begins_with_its_data_and_has_an_id_for_those_who_ask(processor):
    processor.backend.resumable = True
    async with client(processor) as c:
        plain = (await c.post("/v1/completions", json=ASK | {"stream": True})).text
        asked = [
            (await c.post("/v1/completions", json=ASK | {"stream": True, "event_ids": True})).text,
            (await c.post("/v1/completions", json=ASK | {"stream": True}, headers={"X-Moejax-Event-Ids": "true"})).text,
        ]
        assert all(line.startswith("data: ") for line in plain.splitlines() if line)
        for text in asked:
            events = [event.splitlines() for event in text.split("\n\n") if event]
            assert all(event[0].startswith("data: ") for event in events)
            assert all(event[1].startswith("id: ") for event in events[:-1])
        ids = [line.removeprefix("id: ") for line in asked[0].splitlines() if line.startswith("id: ")]
        rest = (await c.get("/v1/resume", headers={"Last-Event-ID": ids[0]})).text
        assert rest == asked[0].split("\n\n", 1)[1]
        call = json.loads(plain.split("\n\n")[0].removeprefix("data: "))["id"]
        again = (await c.get("/v1/resume", headers={"Last-Event-ID": call})).text
        assert [line for line in again.splitlines() if line.startswith("data: ")] == plain.split("\n\n")[:-1]


async def test_ignored_fields_are_named_in_a_header_of_answers_and_streams(processor):
    sent = ASK | {"user": "u", "temprature": 1, "a\r\nb, c\u20ac": 1, "": 1}
    async with client(processor) as c:
        for more in ({}, {"stream": True}):
            answer = await c.post("/v1/completions", json=sent | more)
            assert answer.headers["x-moejax-ignored-fields"] == 'user, temprature, a??b??c?, ""'
        assert "x-moejax-ignored-fields" not in (await c.post("/v1/completions", json=ASK)).headers
    async with client(processor, strict_fields=True) as c:
        refused = (await c.post("/v1/completions", json=sent)).json()["error"]
    assert refused["param"] == "temprature"
    assert "Did you mean 'temperature'?" in refused["message"]


async def test_the_usage_so_far_is_in_every_event_for_those_who_ask(processor):
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with client(processor) as c:
        text = (await c.post("/v1/completions", json=ASK | {"stream": True, "stream_options": options})).text
    events = [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n")[:-2]]
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 3, 3]
    assert {event["usage"]["prompt_tokens"] for event in events} == {1}


async def test_a_model_has_the_names_that_it_is_served_under(processor):
    async with client(processor, served_model_name="gpt-x, other") as c:
        models = (await c.get("/v1/models/")).json()["data"]
        assert [model["id"] for model in models] == ["gpt-x", "other"]
        assert (await c.get("/v1/models/other")).json()["id"] == "other"
        for name in ("gpt-x", "other"):
            assert (await c.post("/v1/completions", json=ASK | {"model": name})).status_code == 200
        for answer in (
            await c.post("/v1/completions", json=ASK | {"model": "fake"}),
            await c.get("/v1/models/fake"),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


async def test_errors_have_the_codes_of_openai(processor):
    async with client(processor) as c:
        for body in ({"prompt": "x" * 256}, {"prompt": "x", "max_tokens": 256}):
            error = (await c.post("/v1/completions", json=body)).json()["error"]
            assert error["code"] == "context_length_exceeded"
            assert error["message"].startswith("This model's maximum context length is 256 tokens")
        processor.backend.max_queue = 0
        limited = await c.post("/v1/completions", json=ASK)
        assert (limited.status_code, limited.json()["error"]["code"]) == (429, "rate_limit_exceeded")


async def test_tokens_of_a_text_are_those_of_its_completion_with_bos_or_without(processor):
    processor.tokenizer = Tokenizer(processor.tokenizer.format, bos_token=256)
    async with client(processor) as c:
        for special, begin in ((None, [256]), (True, [256]), (False, [])):
            asked = {"prompt": "ab", "add_special_tokens": special}
            assert (await c.post("/tokenize", json=asked)).json()["tokens"] == [*begin, 97, 98]
            await c.post("/v1/completions", json=asked | {"max_tokens": 1})
            assert processor.backend.requests[-1].prompt == (*begin, 97, 98)
        named = (await c.post("/tokenize", json={"prompt": "ab", "return_token_strs": True})).json()
        assert (named["count"], named["token_strs"][1:]) == (3, ["a", "b"])
        assert (await c.post("/tokenize", json={"prompt": ""})).json()["tokens"] == [256]
        assert (await c.post("/tokenize", json={})).json()["error"]["param"] == "prompt"
        for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [97]})):
            assert (await c.post(path, json=body | {"model": None})).status_code == 200
            assert (await c.post(path, json=body | {"model": "gpt-4"})).json()["error"]["code"] == "model_not_found"


async def test_a_body_may_begin_with_a_byte_order_mark(processor):
    async with client(processor) as c:
        sent = codecs.BOM_UTF8 + json.dumps(ASK).encode()
        assert (await c.post("/v1/completions", content=sent)).json()["choices"][0]["text"] == "bcd"
