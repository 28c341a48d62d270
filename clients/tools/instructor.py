# /// script
# dependencies = ["instructor==1.17.0"]
# [tool.clients]
# name = "instructor"
# ///
"""Instructor: values of a pydantic model, in its modes for OpenAI's API."""

from typing import Literal

import instructor
import openai
import pydantic

from clients import trials
from clients.trials import MESSAGES, trial


class Weather(pydantic.BaseModel, extra="forbid"):
    """The weather of a city. No other fields: a small model invents them."""

    city: Literal["Paris", "Rome"]
    days: int = pydantic.Field(ge=1, le=9)


def ask(mode: instructor.Mode) -> None:
    raw = openai.OpenAI(base_url=f"{trials.base()}/v1", api_key="none", max_retries=0)
    client = instructor.from_openai(raw, mode=mode)
    asked = {"model": trials.model(), "messages": MESSAGES, "max_tokens": 60, "temperature": 0, "max_retries": 0}
    found = client.chat.completions.create(response_model=Weather, **asked)
    assert isinstance(found, Weather), found


@trial("Mode.TOOLS")
def tools() -> None:
    ask(instructor.Mode.TOOLS)


@trial("Mode.JSON_SCHEMA")
def json_schema() -> None:
    ask(instructor.Mode.JSON_SCHEMA)


@trial("create_partial, streamed")
def partial() -> None:
    raw = openai.OpenAI(base_url=f"{trials.base()}/v1", api_key="none", max_retries=0)
    client = instructor.from_openai(raw, mode=instructor.Mode.TOOLS)
    asked = {"model": trials.model(), "messages": MESSAGES, "max_tokens": 60, "temperature": 0}
    *_, last = client.chat.completions.create_partial(response_model=Weather, **asked)
    assert last.city in ("Paris", "Rome"), last


if __name__ == "__main__":
    trials.main()
