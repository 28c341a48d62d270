# /// script
# dependencies = ["pydantic-ai-slim[openai,anthropic]==2.68.0"]
# [tool.clients]
# name = "pydantic-ai"
# ///
"""Pydantic AI's agents over its OpenAI, Responses and Anthropic models: text, streams, outputs of a form."""

import asyncio
from typing import Literal

import pydantic
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

from clients import trials
from clients.trials import MESSAGES, TOKENS, same, trial

OPENAI = OpenAIProvider(base_url=f"{trials.base()}/v1", api_key="none")
CHAT = OpenAIChatModel(trials.model(), provider=OPENAI)
RESPONSES = OpenAIResponsesModel(trials.model(), provider=OPENAI)
ANTHROPIC = AnthropicModel(trials.model(), provider=AnthropicProvider(base_url=trials.base(), api_key="none"))
TEXT = MESSAGES[0]["content"]


class Weather(pydantic.BaseModel, extra="forbid"):
    """The weather of a city. No other fields: a small model invents them."""

    city: Literal["Paris", "Rome"]
    days: int = pydantic.Field(ge=1, le=9)


def agent(model: object, tokens: int = TOKENS, **more: object) -> Agent:
    return Agent(model, model_settings={"max_tokens": tokens, "temperature": 0}, retries=0, **more)


def both(model: object) -> None:
    same(agent(model).run_sync(TEXT).output, trials.chat())

    async def stream() -> str:
        async with agent(model).run_stream(TEXT) as run:
            return "".join([part async for part in run.stream_text(delta=True, debounce_by=None)])

    same(asyncio.run(stream()), trials.chat())


@trial("chat model: run_sync, run_stream")
def chat() -> None:
    both(CHAT)


@trial("Responses model: run_sync, run_stream")
def responses() -> None:
    both(RESPONSES)


@trial("Anthropic model: run_sync, run_stream")
def anthropic() -> None:
    both(ANTHROPIC)


@trial("output_type, by a tool call and by the response format")
def outputs() -> None:
    for form in (ToolOutput(Weather), NativeOutput(Weather)):
        found = agent(CHAT, 90, output_type=form).run_sync(TEXT).output
        assert isinstance(found, Weather), found


if __name__ == "__main__":
    trials.main()
