# /// script
# dependencies = ["anthropic==2.14.0"]
# [tool.clients]
# name = "anthropic (Python)"
# ///
"""Anthropic's official client: messages, streams, tools and token counts."""

import anthropic

from clients import trials
from clients.trials import MESSAGES, TOKENS, WEATHER, check_weather, same, trial

CLIENT = anthropic.Anthropic(base_url=trials.base(), api_key="none", max_retries=0)
GREEDY = {"temperature": 0}
"""This version of the client has no argument for it."""
ASKED = {"model": trials.model(), "messages": MESSAGES, "max_tokens": TOKENS, "extra_body": GREEDY}
TOOL = {"name": "weather", "description": "The weather of a city", "input_schema": WEATHER}


@trial("messages")
def messages() -> None:
    answer = CLIENT.messages.create(**ASKED)
    same(answer.content[0].text, trials.chat())
    same((answer.stop_reason, answer.usage.output_tokens), ("max_tokens", TOKENS))


@trial("messages, streamed")
def stream() -> None:
    with CLIENT.messages.stream(**ASKED) as events:
        same("".join(events.text_stream), trials.chat())


@trial("a required tool call, whole and streamed")
def tool_call() -> None:
    asked = ASKED | {"tools": [TOOL], "tool_choice": {"type": "any"}, "max_tokens": 60}
    (used,) = (block for block in CLIENT.messages.create(**asked).content if block.type == "tool_use")
    check_weather(used.input)
    with CLIENT.messages.stream(**asked) as events:
        (streamed,) = (block for block in events.get_final_message().content if block.type == "tool_use")
    same(streamed.input, used.input)


@trial("tool results in the history")
def tool_results() -> None:
    used = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome", "days": 1}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "sun"}
    turns = [{"role": "assistant", "content": [used]}, {"role": "user", "content": [result]}]
    same(CLIENT.messages.create(**ASKED | {"messages": MESSAGES + turns, "tools": [TOOL]}).usage.output_tokens, TOKENS)


@trial("count_tokens")
def count_tokens() -> None:
    counted = CLIENT.messages.count_tokens(model=trials.model(), messages=MESSAGES).input_tokens
    same(counted, CLIENT.messages.create(**ASKED).usage.input_tokens)


@trial("errors by their classes")
def errors() -> None:
    try:
        CLIENT.messages.create(**ASKED | {"extra_body": {"temperature": -1}})
    except anthropic.BadRequestError:
        return
    raise AssertionError("temperature -1 raised no BadRequestError")


if __name__ == "__main__":
    trials.main()
