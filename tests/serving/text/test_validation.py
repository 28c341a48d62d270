"""An error of the range checks has the names of the API that the caller uses, and says what is allowed."""

from typing import Any

import grpc
import httpx
import pytest

from serving.api.client import AsyncClient
from serving.errors import InvalidRequest
from serving.protocol.sampling import SamplingParams, StructuredOutputs
from serving.text.validation import FieldNames, check_sampling
from tests.support.fake_backend import FakeBackend
from tests.support.fake_server import serve

pytestmark = pytest.mark.anyio
TURNS = [{"role": "user", "content": "hi"}]
LONG = [{"role": "user", "content": "x" * 300}]
CHAT, RESPONSES, ANTHROPIC = "/v1/chat/completions", "/v1/responses", "/v1/messages"
MESSAGE = {"model": "fake", "max_tokens": 4, "messages": TURNS}
REFUSED: list[Any] = [
    ("/v1/completions", {"prompt": "hi", "max_tokens": 0}, "max_tokens", "max_tokens is 0"),
    (CHAT, {"messages": TURNS, "max_tokens": 0}, "max_tokens", "max_tokens is 0"),
    (CHAT, {"messages": TURNS, "max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens is 0"),
    (
        CHAT,
        {"messages": TURNS, "max_completion_tokens": 999},
        "max_completion_tokens",
        "leave max_completion_tokens out",
    ),
    (
        CHAT,
        {"messages": TURNS, "max_completion_tokens": 2, "min_tokens": 3},
        "min_tokens",
        "min_tokens is 3 and max_completion_tokens 2",
    ),
    (CHAT, {"messages": LONG}, "messages", "maximum context length"),
    (CHAT, {"messages": TURNS, "top_k": -5}, "top_k", "between -1 and 2147483647 (0 and -1: all tokens)"),
    (RESPONSES, {"input": "hi", "max_output_tokens": 0}, "max_output_tokens", "max_output_tokens is 0"),
    (RESPONSES, {"input": "hi", "max_output_tokens": 9999}, "max_output_tokens", "leave max_output_tokens out"),
    (RESPONSES, {"input": "x" * 300}, "input", "maximum context length"),
    (RESPONSES, {"input": "hi", "text": {"format": {"type": "xml"}}}, "text.format.type", "'xml'"),
    (
        RESPONSES,
        {"input": "hi", "text": {"format": {"type": "json_schema", "schema": {"type": "so"}}}},
        "text.format",
        "cannot be used",
    ),
    (ANTHROPIC, MESSAGE | {"max_tokens": 0}, None, "max_tokens is 0"),
    (ANTHROPIC, MESSAGE | {"stop_sequences": ["x"] * 17}, None, "stop_sequences has 17 texts"),
    (ANTHROPIC, MESSAGE | {"stop_sequences": [""]}, None, "a text of stop_sequences has 0 characters"),
]


@pytest.mark.parametrize(("path", "body", "param", "text"), REFUSED)
async def test_an_error_has_the_name_that_the_caller_sent(path, body, param, text):
    async with serve(FakeBackend()) as server, httpx.AsyncClient(base_url=server.url) as client:
        answer = await client.post(path, json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error.get("param") == param  # Anthropic's errors have no such field
    assert text in error["message"]


async def test_a_constraint_has_its_name_in_grpc():
    async with serve(FakeBackend()) as server, AsyncClient(server.address) as client:
        for made, name in (
            (StructuredOutputs("json", '{"type": "so"}'), "json_schema"),
            (StructuredOutputs("lark", "start: ("), "grammar"),
        ):
            with pytest.raises(InvalidRequest) as caught:
                await client.generate("hi", structured_outputs=made)
            assert caught.value.param == name


async def test_the_gateway_of_vllm_reads_its_own_names():
    messages = pytest.importorskip("smg_grpc_proto.vllm_engine_pb2", reason="needs moejax[vllm]")
    stubs = pytest.importorskip("smg_grpc_proto.vllm_engine_pb2_grpc", reason="needs moejax[vllm]")
    sampling = messages.SamplingParams(logprobs=21)
    request = messages.GenerateRequest(request_id="r", text="hi", sampling_params=sampling)
    async with serve(FakeBackend(), vllm=True) as server, grpc.aio.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="logprobs is 21") as caught:
            [_ async for _ in stubs.VllmEngineStub(channel).Generate(request)]
    assert "top_logprobs" not in str(caught.value.details())


def test_every_top_k_from_minus_one_on_is_accepted_and_resolved():
    for top_k, resolved in ((-1, 0), (0, 0), (7, 7), (10**6, 300)):
        params = SamplingParams(top_k=top_k)
        check_sampling(params, 300)
        assert params.resolve(seed=0, room=1, vocab_size=300, model_stop_tokens=()).top_k == resolved


def test_only_the_first_name_of_a_path_is_replaced():
    names = FieldNames(prompt="input", stop="stop_sequences")
    paths = ("stop[2].stop", "stop", "stops", "prompt.a", None)
    assert [names.path(path) for path in paths] == [
        "stop_sequences[2].stop",
        "stop_sequences",
        "stops",
        "input.a",
        None,
    ]
