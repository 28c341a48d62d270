"""Calls of tools found in a stream of answers, for surfaces whose parts are our own items."""

import contextlib
import dataclasses
from collections.abc import AsyncGenerator

from serving.generation import Chunk, Complete, Item
from serving.tools import ToolCall, ToolCalls


async def with_calls(items: AsyncGenerator[Item, None]) -> AsyncGenerator[Item, None]:
    """The items of `items`, with text that is a call of a tool taken out of it and told as one. An answer that ends
    by itself after a call has the reason tool_calls."""
    parsers: dict[int, ToolCalls] = {}
    called: set[int] = set()
    epochs: dict[int, int] = {}
    async with contextlib.aclosing(items):
        async for item in items:
            parser = parsers.setdefault(item.choice, ToolCalls())
            if isinstance(item, Chunk):
                item = _split(item, parser.push(item.text))
                epochs[item.choice] = item.epoch
                called |= {item.choice} if item.calls else set()
            elif isinstance(item, Complete):
                rest = Chunk(
                    index=item.completion_tokens,
                    token_ids=(),
                    text="",
                    logprobs=(),
                    epoch=epochs.get(item.choice, 0),
                    choice=item.choice,
                )
                rest = _split(rest, parser.flush())
                called |= {item.choice} if rest.calls else set()
                if rest.text or rest.calls:
                    yield rest
                if item.choice in called and item.reason == "stop":
                    item = dataclasses.replace(item, reason="tool_calls")
            yield item


def _split(chunk: Chunk, found: list[str | ToolCall]) -> Chunk:
    text = "".join(each for each in found if isinstance(each, str))
    return dataclasses.replace(chunk, text=text, calls=tuple(each for each in found if isinstance(each, ToolCall)))
