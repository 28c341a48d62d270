# /// script
# dependencies = ["langchain-openai==1.7.4"]
# [tool.clients]
# name = "langchain-openai"
# ///
"""LangChain's chat model and completion model: text, streams, structured output and bound tools."""

import asyncio

import langchain_openai

from clients import trials
from clients.trials import MESSAGES, PROMPT, TOKENS, WEATHER, check_weather, same, trial

SETTINGS = {"base_url": f"{trials.base()}/v1", "api_key": "none", "temperature": 0, "max_retries": 0}
FORM = {"title": "weather", "description": "The weather of a city", **WEATHER}


def chat_model(tokens: int = TOKENS, **more: object) -> langchain_openai.ChatOpenAI:
    return langchain_openai.ChatOpenAI(model=trials.model(), max_tokens=tokens, **SETTINGS, **more)


@trial("OpenAI: invoke and stream")
def completions() -> None:
    model = langchain_openai.OpenAI(model=trials.model(), max_tokens=TOKENS, **SETTINGS)
    same(model.invoke(PROMPT), trials.completion())
    same("".join(model.stream(PROMPT)), trials.completion())


@trial("ChatOpenAI: invoke, stream, batch")
def chat() -> None:
    same(chat_model().invoke(MESSAGES).content, trials.chat())
    same("".join(chunk.content for chunk in chat_model().stream(MESSAGES)), trials.chat())
    same([answer.content for answer in chat_model().batch([MESSAGES] * 4)], [trials.chat()] * 4)


@trial("ChatOpenAI: ainvoke")
def asynchronous() -> None:
    same(asyncio.run(chat_model().ainvoke(MESSAGES)).content, trials.chat())


@trial("ChatOpenAI with the Responses API")
def responses() -> None:
    same(chat_model(use_responses_api=True).invoke(MESSAGES).text, trials.chat())
    streamed = chat_model(use_responses_api=True).stream(MESSAGES)
    same("".join(chunk.text for chunk in streamed), trials.chat())


@trial("with_structured_output: json_schema and function_calling")
def structured() -> None:
    for method in ("json_schema", "function_calling"):
        check_weather(chat_model(60).with_structured_output(FORM, method=method).invoke(MESSAGES))


@trial("bind_tools, the result in the history")
def tools() -> None:
    model = chat_model(60).bind_tools([FORM], tool_choice="weather")
    called = model.invoke(MESSAGES)
    check_weather(called.tool_calls[0]["args"])
    turns = [called, {"role": "tool", "tool_call_id": called.tool_calls[0]["id"], "content": "sun"}]
    same(chat_model().bind_tools([FORM]).invoke(MESSAGES + turns).usage_metadata["output_tokens"], TOKENS)


if __name__ == "__main__":
    trials.main()
