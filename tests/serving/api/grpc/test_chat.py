"""Chats over gRPC: tools as OpenAI's surface has them, and the tokens of texts."""

import grpc
import grpc.aio
import pytest

from serving.api.client import AsyncClient
from serving.core.prompts import Conversation
from serving.proto.moejax.v1 import inference_pb2, inference_pb2_grpc
from simulation.byte_tokenizer import byte_tokenizer
from tests.support.fake_backend import FakeBackend
from tests.support.fake_server import serve
from tests.support.tool_prompts import CALL, TOOLS, USER, WITH_TOOLS

pytestmark = pytest.mark.anyio


def conversation(*turns, **changes) -> Conversation:
    return Conversation(messages=(*USER, *turns), tools=tuple(TOOLS), **changes)


def asking(choice: str = "", **fields) -> inference_pb2.GenerateRequest:
    tools = ['{"type": "function", "function": {"name": "add"}}']
    turns = [inference_pb2.Message(role="user", content=["hi"])]
    chat = inference_pb2.Chat(messages=turns, tools=tools, tool_choice=choice)
    return inference_pb2.GenerateRequest(chat=chat, **fields)


async def refused(stub, request) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.Generate(request):
            pass
    return caught.value


@pytest.mark.parametrize("count", [1, 3])
async def test_calls_are_separated_from_text_in_every_answer(backend: FakeBackend, count: int):
    backend.reply = list(CALL.encode())
    async with serve(backend) as server, AsyncClient(server.address) as client:
        server.processor.tokenizer = byte_tokenizer(WITH_TOOLS)
        answers = await client.generate_all(conversation(), n=count)
    for answer in answers:
        assert (answer.text, answer.reason) == ("Sure.", "tool_calls")
        assert [(call.name, call.arguments) for call in answer.calls] == [("add", '{"x": 1}')]
        assert answer.completion_tokens == len(CALL)
        assert bytes(answer.token_ids) == CALL.encode()
    assert len(answers) == count


async def test_what_only_begins_like_a_call_is_text(backend: FakeBackend):
    text = "a <tool_call> b"
    backend.reply = list(text.encode())
    async with serve(backend) as server, AsyncClient(server.address) as client:
        server.processor.tokenizer = byte_tokenizer(WITH_TOOLS)
        answer = await client.generate(conversation())
        plain = await client.generate(Conversation(messages=tuple(USER)))
    assert (answer.text, answer.reason, answer.calls) == (text, "stop", ())
    assert plain.text == text


async def test_a_conversation_goes_on_after_a_call(backend: FakeBackend):
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    turns = (
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    )
    async with serve(backend) as server, AsyncClient(server.address) as client:
        server.processor.tokenizer = byte_tokenizer(WITH_TOOLS)
        await client.generate(conversation(*turns), max_tokens=1)
    text = bytes(token for token in backend.requests[0].prompt if token < 256).decode()
    assert text == '[add]hi{"x": 1}<|tool|>2'


async def test_the_choice_of_a_tool_binds_the_answer(backend: FakeBackend):
    async with serve(backend) as server, grpc.aio.insecure_channel(server.address) as channel:
        server.processor.tokenizer = byte_tokenizer(WITH_TOOLS)
        stub = inference_pb2_grpc.InferenceStub(channel)
        limit = inference_pb2.SamplingParams(max_tokens=1)
        for choice in ("required", "add", "auto", "", "none"):
            async for _ in stub.Generate(asking(choice, sampling=limit)):
                pass
        kinds = [
            request.sampling.structured_outputs.kind if request.sampling.structured_outputs else None
            for request in backend.requests
        ]
        assert kinds == ["tools", "tools", None, None, None]
        told = [bytes(t for t in request.prompt if t < 256).startswith(b"[add]") for request in backend.requests]
        assert told == [True, True, True, True, False]
        error = await refused(stub, asking("subtract"))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "tool_choice names 'subtract'; the tools are ['add']" in str(error.details())
        both = inference_pb2.SamplingParams(regex="a+")
        assert "exclude each other" in str((await refused(stub, asking("required", sampling=both))).details())


@pytest.mark.parametrize("text", ["[]", "{", "1"])
async def test_switches_of_the_template_must_be_an_object(backend: FakeBackend, text: str):
    async with serve(backend) as server, grpc.aio.insecure_channel(server.address) as channel:
        request = asking()
        request.chat.template_variables = text
        error = await refused(inference_pb2_grpc.InferenceStub(channel), request)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "template_variables" in str(error.details())


async def test_tokens_of_texts_and_back(backend: FakeBackend):
    async with serve(backend) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        tokens = await stub.Tokenize(inference_pb2.TokenizeRequest(text="né"))
        assert tuple(tokens.ids) == await server.processor.encode("né")
        assert (await stub.Detokenize(inference_pb2.TokenIds(ids=tokens.ids[-3:]))).text == "né"
        with pytest.raises(grpc.aio.AioRpcError, match="vocabulary"):
            await stub.Detokenize(inference_pb2.TokenIds(ids=[2**31]))
