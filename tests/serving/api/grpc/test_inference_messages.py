"""Requests and items arrive as they were sent."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.api.client import AsyncClient
from serving.api.grpc import inference_messages as messages
from serving.core.answers import Chunk, Complete, PromptScores
from serving.core.prompts import Conversation
from serving.errors import InvalidRequest
from serving.protocol.sampling import SamplingParams, StructuredOutputs
from serving.text.answer_parts import ToolCall
from tests.support.fake_server import serve

pytestmark = pytest.mark.anyio

F32 = st.floats(width=32, min_value=-2, max_value=2)
TOP = st.lists(st.tuples(st.integers(0, 2**31), F32), max_size=3).map(tuple)
GUIDES = st.one_of(
    st.builds(StructuredOutputs, st.sampled_from(("json", "regex", "lark")), st.text()),
    st.lists(st.text(), min_size=1).map(lambda texts: StructuredOutputs("choice", json.dumps(texts))),
)
PARAMS = st.builds(
    SamplingParams,
    n=st.integers(1, 9),
    temperature=F32,
    max_tokens=st.none() | st.integers(0, 2**31 - 1),
    min_tokens=st.integers(0, 99),
    ignore_eos=st.booleans(),
    frequency_penalty=F32,
    presence_penalty=F32,
    repetition_penalty=F32,
    logit_bias=st.dictionaries(st.integers(0, 99), F32).map(lambda bias: tuple(sorted(bias.items()))),
    top_logprobs=st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
    stop_tokens=st.lists(st.integers(0, 99)).map(tuple),
    structured_outputs=st.none() | GUIDES,
    priority=st.integers(-(2**31), 2**31 - 1),
    speculate=st.none() | st.booleans(),
)
CHOICE = st.integers(0, 127)
ITEMS = st.one_of(
    st.builds(PromptScores, position=st.integers(1, 9), token_ids=st.tuples(st.integers(0, 9)), logprobs=st.tuples(F32),
              top=st.tuples(TOP), choice=CHOICE),
    st.builds(Chunk, index=st.integers(0, 9), token_ids=st.tuples(st.integers(0, 9)), text=st.text(),
              logprobs=st.tuples(F32), epoch=st.integers(0, 9), top=st.tuples(TOP), choice=CHOICE,
              calls=st.lists(st.builds(ToolCall, st.text(), st.text()), max_size=2).map(tuple)),
    st.builds(Complete, request_id=st.text(), reason=st.sampled_from(("stop", "length", "tool_calls")),
              prompt_tokens=st.integers(0, 9),
              completion_tokens=st.integers(0, 9), epochs=st.tuples(st.integers(0, 9)), seed=st.integers(0, 9),
              matched=st.none() | st.text() | st.integers(0, 9), cached_tokens=st.integers(0, 9), choice=CHOICE,
              degraded=st.booleans(), accepted_drafts=st.integers(0, 9)),
)  # fmt: skip


@given(PARAMS)
def test_sampling_parameters_arrive_as_they_were(params):
    message = messages.request_to_proto((1, 2), params, "r")
    assert messages.sampling_from_proto(type(message).FromString(message.SerializeToString()).sampling) == params


@given(ITEMS)
def test_items_arrive_as_they_were(item):
    message = messages.response_to_proto(item)
    assert messages.response_from_proto(type(message).FromString(message.SerializeToString())) == item


def test_a_conversation_with_tools_arrives_as_it_was():
    tools = ({"type": "function", "function": {"name": "add"}},)
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"x": [1, "é"]}}}
    turns = (
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3", "name": "add", "tool_call_id": "c1"},
    )
    asked = Conversation(messages=turns, tools=tools, variables={"enable_thinking": False})
    message = messages.request_to_proto(asked, SamplingParams())
    assert messages.prompt_from_proto(message) == asked
    message.chat.tools.append("{")
    with pytest.raises(InvalidRequest, match="a tool is not valid JSON"):
        messages.prompt_from_proto(message)


async def test_all_answers_and_scores_come_over_grpc_and_one_abort_ends_them(backend):
    async with serve(backend) as server, AsyncClient(server.address) as client:
        said = await client.generate_all([97, 98], n=3, max_tokens=2, top_logprobs=2, prompt_logprobs=1, seed=5)
        assert [result.token_ids for result in said] == [(99, 100)] * 3
        assert [result.seed for result in said] == [5, 6, 7]
        assert [result.prompt_logprobs for result in said] == [(-0.25,)] * 3
        assert said[0].top == (((99, -0.5), (0, -2.0)), ((100, -0.5), (0, -2.0)))
        assert said[0].prompt_top == (((98, -0.25),),)
        scored = await client.generate([97, 98, 99], max_tokens=0, prompt_logprobs=0)
        assert (scored.token_ids, scored.prompt_logprobs) == ((), (-0.25, -0.25))
        backend.delay_s = 0.05
        stream = client.stream([97], n=2, request_id="mine")
        async for _ in stream:
            break
        running = client.stream([97], n=2, request_id="other")
        items = aiter(running)
        await anext(items)
        assert await client.abort("other")
        with pytest.raises(Exception, match="aborted"):
            async for _ in items:
                pass
    assert backend.running == 0
