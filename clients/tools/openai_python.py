# /// script
# dependencies = ["openai==3.57.0"]
# [tool.clients]
# name = "openai (Python)"
# ///
"""The official OpenAI client: completions, chat, structured answers, tools and the Responses API."""

import asyncio
import json

import openai
import pydantic

from clients import trials
from clients.trials import MESSAGES, PROMPT, TOKENS, WEATHER, check_weather, same, trial

CLIENT = openai.OpenAI(base_url=f"{trials.base()}/v1", api_key="none", max_retries=0)
CHAT = {"model": trials.model(), "messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": WEATHER}}


class Forecast(pydantic.BaseModel):
    """A form with another one inside, which pydantic writes with $defs."""

    class Day(pydantic.BaseModel):
        warm: bool

    days: list[Day] = pydantic.Field(min_length=1, max_length=2)


@trial("models")
def models() -> None:
    same([model.id for model in CLIENT.models.list()], [trials.model()])
    same(CLIENT.models.retrieve(trials.model()).id, trials.model())


@trial("completions, whole and streamed")
def completions() -> None:
    asked = {"model": trials.model(), "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    same(CLIENT.completions.create(**asked).choices[0].text, trials.completion())
    same("".join(c.choices[0].text for c in CLIENT.completions.create(**asked, stream=True)), trials.completion())


@trial("chat, whole and streamed, with usage")
def chat() -> None:
    same(CLIENT.chat.completions.create(**CHAT).choices[0].message.content, trials.chat())
    chunks = list(CLIENT.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
    same("".join(c.choices[0].delta.content or "" for c in chunks if c.choices), trials.chat())
    same(chunks[-1].usage.completion_tokens, TOKENS)


@trial("asynchronous chat, eight at once")
def asynchronous() -> None:
    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{trials.base()}/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(*(client.chat.completions.create(**CHAT) for _ in range(8)))
        return [answer.choices[0].message.content for answer in answers]

    same(asyncio.run(ask()), [trials.chat()] * 8)


@trial("chat.completions.parse of a pydantic model")
def parse() -> None:
    answer = CLIENT.chat.completions.parse(**CHAT | {"max_tokens": 60}, response_format=Forecast)
    assert isinstance(answer.choices[0].message.parsed, Forecast), answer


@trial("a required tool call, whole and streamed")
def tool_call() -> None:
    asked = CHAT | {"tools": [TOOL], "tool_choice": "required", "max_tokens": 60}
    (made,) = CLIENT.chat.completions.create(**asked).choices[0].message.tool_calls
    check_weather(json.loads(made.function.arguments))
    with CLIENT.chat.completions.stream(**asked) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
    same((streamed.function.name, streamed.function.arguments), ("weather", made.function.arguments))


@trial("tool results in the history")
def tool_results() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome","days":1}'}}
    turns = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c1", "content": "sun"}]
    answer = CLIENT.chat.completions.create(**CHAT | {"messages": MESSAGES + turns, "tools": [TOOL]})
    same(answer.usage.completion_tokens, TOKENS)


@trial("responses, whole, streamed, stored and continued")
def responses() -> None:
    asked = {"model": trials.model(), "input": MESSAGES[0]["content"], "max_output_tokens": TOKENS, "temperature": 0}
    answer = CLIENT.responses.create(**asked)
    same(answer.output_text, trials.chat())
    events = list(CLIENT.responses.create(**asked, stream=True))
    same("".join(event.delta for event in events if event.type == "response.output_text.delta"), trials.chat())
    same(CLIENT.responses.retrieve(answer.id).output_text, trials.chat())
    after = CLIENT.responses.create(**asked | {"input": "And then?"}, previous_response_id=answer.id)
    assert after.usage.input_tokens > answer.usage.input_tokens + answer.usage.output_tokens, after.usage


@trial("errors by their classes")
def errors() -> None:
    asked = {"model": trials.model(), "prompt": PROMPT}
    for wrong, error in (({"max_tokens": -2}, openai.BadRequestError), ({"model": "other"}, openai.NotFoundError)):
        try:
            CLIENT.completions.create(**asked | wrong)
        except error:
            continue
        raise AssertionError(f"{wrong} raised no {error.__name__}")


if __name__ == "__main__":
    trials.main()
