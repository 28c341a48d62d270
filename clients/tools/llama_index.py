# /// script
# dependencies = ["llama-index-llms-openai-like==0.8.1"]
# [tool.clients]
# name = "llama-index"
# ///
"""LlamaIndex's OpenAILike: completions, chat, streams, structured prediction and tools."""

from typing import Literal

import pydantic
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

from clients import trials
from clients.trials import MESSAGES, PROMPT, TOKENS, same, trial

TURNS = [ChatMessage(**MESSAGES[0])]


class Weather(pydantic.BaseModel, extra="forbid"):
    """The weather of a city. No other fields: a small model invents them."""

    city: Literal["Paris", "Rome"]
    days: int = pydantic.Field(ge=1, le=9)


def model(tokens: int = TOKENS, *, chat: bool = True) -> OpenAILike:
    return OpenAILike(
        model=trials.model(),
        api_base=f"{trials.base()}/v1",
        api_key="none",
        is_chat_model=chat,
        is_function_calling_model=True,
        context_window=512,
        max_tokens=tokens,
        temperature=0,
        max_retries=0,
    )


def weather(city: Literal["Paris", "Rome"], days: int) -> str:
    """The weather of a city."""
    return f"sun in {city} for {days} days"


@trial("complete and stream_complete")
def completions() -> None:
    same(model(chat=False).complete(PROMPT).text, trials.completion())
    same("".join(part.delta for part in model(chat=False).stream_complete(PROMPT)), trials.completion())


@trial("chat and stream_chat")
def chat() -> None:
    same(model().chat(TURNS).message.content, trials.chat())
    same("".join(part.delta or "" for part in model().stream_chat(TURNS)), trials.chat())


@trial("structured_predict")
def structured() -> None:
    found = model(60).structured_predict(Weather, PromptTemplate("The weather?"))
    assert isinstance(found, Weather), found


@trial("chat_with_tools, a required call")
def tools() -> None:
    tool = FunctionTool.from_defaults(weather, fn_schema=Weather)
    answer = model(60).chat_with_tools([tool], user_msg="The weather?", tool_required=True)
    (call,) = model().get_tool_calls_from_response(answer)
    assert call.tool_kwargs["city"] in ("Paris", "Rome"), call


if __name__ == "__main__":
    trials.main()
