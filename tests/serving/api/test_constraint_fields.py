"""A constraint that cannot be used is refused by the field in which the caller sent it, in every API."""

import json
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest

from serving.api.client import Client
from serving.api.grpc.errors import error_from_status
from serving.errors import InvalidRequest
from serving.proto.moejax.v1 import inference_pb2, inference_pb2_grpc
from serving.protocol.sampling import StructuredOutputs
from simulation.byte_tokenizer import byte_tokenizer
from tests.support.fake_backend import FakeBackend
from tests.support.fake_server import FakeServer, serve_in_thread
from tests.support.tool_prompts import USER, WITH_TOOLS

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "nothing"}}}
GOOD: dict[str, Any] = {"type": "object", "properties": {}}
TOO_MUCH = ["a" * 100_001]
FIELDS: dict[str, Any] = {
    "json_schema": json.dumps(SCHEMA),
    "guided_json": SCHEMA,
    "structured_outputs.json": SCHEMA,
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
    "regex": "(",
    "guided_regex": "(",
    "structured_outputs.regex": "(",
    "choice": TOO_MUCH,
    "guided_choice": TOO_MUCH,
    "structured_outputs.choice": TOO_MUCH,
    "guided_grammar": "start: missing",
    "structured_outputs.grammar": "start: missing",
}
CALLED = {"type": "function", "function": {"name": "bad"}}
CHOICES = ["required", CALLED, {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [CALLED]}}]


@pytest.fixture
def server(backend: FakeBackend) -> Iterator[FakeServer]:
    with serve_in_thread(backend, vllm=True) as server:
        server.processor.tokenizer = byte_tokenizer(WITH_TOOLS)
        yield server


def refused(server: FakeServer, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The error of a request, and no word of it reaches the backend."""
    answer = httpx.post(server.url + path, json={"model": "fake", **body}, timeout=30)
    assert answer.status_code == 400
    assert not server.backend.requests
    return answer.json()["error"]


def functions(**keys: str) -> list[dict[str, Any]]:
    """Two tools of which the second cannot be called, with the names that an API has for its parts."""
    return [{"name": name, keys["schema"]: schema} for name, schema in (("good", GOOD), ("bad", SCHEMA))]


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("chat", [True, False])
def test_openai_names_the_field_that_was_sent(server, name, chat):
    outer, _, inner = name.partition(".")
    sent = {outer: {inner: FIELDS[name]} if inner else FIELDS[name]}
    path, prompt = ("/v1/chat/completions", {"messages": USER}) if chat else ("/v1/completions", {"prompt": "hi"})
    error = refused(server, path, prompt | sent)
    assert error["param"] == name
    assert error["message"].startswith(f"{name}: ")


@pytest.mark.parametrize("choice", CHOICES, ids=["required", "named", "allowed"])
def test_openai_names_the_tool_whose_parameters_are_wrong(server, choice):
    tools = [{"type": "function", "function": function} for function in functions(schema="parameters")]
    body = {"messages": USER, "tools": tools, "tool_choice": choice}
    assert refused(server, "/v1/chat/completions", body)["param"] == "tools[1].function.parameters"


def test_tools_that_are_only_wrong_together_are_named_together(server):
    long = {"type": "object", "properties": {"a": {"const": "x" * 60_000}}}
    tools = [{"type": "function", "function": {"name": name, "parameters": long}} for name in ("one", "two")]
    body = {"messages": USER, "tools": tools, "tool_choice": "required"}
    assert refused(server, "/v1/chat/completions", body)["param"] == "tools"


def test_responses_name_their_own_fields(server):
    form = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    assert refused(server, "/v1/responses", {"input": "hi", "text": form})["param"] == "text.format"
    tools = [{"type": "function", **function} for function in functions(schema="parameters")]
    error = refused(server, "/v1/responses", {"input": "hi", "tools": tools, "tool_choice": "required"})
    assert error["param"] == "tools[1].parameters"
    assert error["message"].startswith("tools[1].parameters: ")


@pytest.mark.parametrize(
    ("sent", "name"),
    [
        ({"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}, "output_config.format"),
        ({"output_format": {"type": "json_schema", "schema": SCHEMA}}, "output_format"),
        ({"tools": functions(schema="input_schema"), "tool_choice": {"type": "any"}}, "tools[1].input_schema"),
    ],
)
def test_anthropic_names_its_own_fields(server, sent, name):
    error = refused(server, "/v1/messages", {"messages": USER, "max_tokens": 5, **sent})
    assert error["message"].startswith(f"{name}: ")


GUIDES = {
    "json_schema": StructuredOutputs("json", json.dumps(SCHEMA)),
    "regex": StructuredOutputs("regex", "("),
    "grammar": StructuredOutputs("lark", "start: missing"),
    "choice": StructuredOutputs("choice", json.dumps(TOO_MUCH)),
}


@pytest.mark.parametrize("name", GUIDES)
def test_grpc_names_its_own_fields(server, name):
    with Client(server) as client, pytest.raises(InvalidRequest, match=f"^{name}: ") as caught:
        client.generate("hi", structured_outputs=GUIDES[name])
    assert caught.value.param == name


def test_grpc_names_the_tool(server):
    tools = [json.dumps({"type": "function", "function": each}) for each in functions(schema="parameters")]
    turns = [inference_pb2.Message(role="user", content=["hi"])]
    chat = inference_pb2.Chat(messages=turns, tools=tools, tool_choice="bad")
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(inference_pb2_grpc.InferenceStub(channel).Generate(inference_pb2.GenerateRequest(chat=chat)))
    call: Any = caught.value
    assert error_from_status(call.code(), call.details(), call.trailing_metadata()).param == "tools[1]"


@pytest.mark.parametrize("name", GUIDES)
def test_vllms_service_names_its_own_fields(server, name):
    pytest.importorskip("smg_grpc_proto", reason="needs moejax[vllm]")
    from smg_grpc_proto import vllm_engine_pb2 as pb
    from smg_grpc_proto import vllm_engine_pb2_grpc as stubs

    value: Any = GUIDES[name].text
    if name == "choice":
        value = pb.ChoiceConstraint(choices=TOO_MUCH)
    sampling = pb.SamplingParams(**{name: value}, max_tokens=3)
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(stubs.VllmEngineStub(channel).Generate(pb.GenerateRequest(text="hi", sampling_params=sampling)))
    call: Any = caught.value
    assert error_from_status(call.code(), call.details(), call.trailing_metadata()).param == name
