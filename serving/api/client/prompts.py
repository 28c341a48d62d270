"""Prompts as callers write them: text, token ids of any kind, messages as `Message` or as dicts."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

from serving.core.prompts import Conversation, Prompt
from serving.errors import InvalidRequest
from serving.text.messages import read_message
from serving.text.tokenizer import Message

ChatTurn = Message | Mapping[str, Any]
"""A message of a conversation: a `Message`, or a dict as OpenAI's clients take it."""
PromptLike = Prompt | Sequence[ChatTurn] | Iterable[int]
"""A prompt, or what becomes one: messages as dicts, an array of token ids."""
_FORMS = "text, token ids, messages or a Conversation"


def read_prompt(value: Any) -> Prompt:
    """The prompt that a caller means. Raises InvalidRequest saying what it must be."""
    if isinstance(value, str | Conversation):
        return value
    if isinstance(value, Mapping | bytes) or not isinstance(value, Iterable):
        raise InvalidRequest(f"the prompt is {_described(value)}; it must be {_FORMS}.", param="prompt")
    items: list[Any] = list(value)
    if items and all(isinstance(item, Message | Mapping) for item in items):
        return _messages(items)
    if any(isinstance(item, str) for item in items):
        raise InvalidRequest(
            f"the prompt is a list of {len(items)} texts, but a call has one prompt. Call once for each; calls of "
            "AsyncClient run side by side with asyncio.gather.",
            param="prompt",
        )
    return _token_ids(items)


def read_tokens(value: Any) -> tuple[int, ...]:
    """The token ids in a list, an array or any other iterable. Raises InvalidRequest for other values."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise InvalidRequest(f"token_ids is {_described(value)}; it must be a list of token ids.", param="token_ids")
    return _token_ids(list(value), "token_ids", "a list of token ids")


def _token_ids(items: Sequence[Any], param: str = "prompt", forms: str = _FORMS) -> tuple[int, ...]:
    try:
        return tuple(map(operator.index, items))
    except TypeError:
        wrong = next((item for item in items if not isinstance(item, SupportsIndex)), items[0])
        subject = "the prompt" if param == "prompt" else param
        raise InvalidRequest(
            f"{subject} has an item that is {_described(wrong)}; it must be {forms}.", param=param
        ) from None


def read_chat(value: str | Iterable[ChatTurn]) -> Prompt:
    """The messages of a conversation. A plain text is one message of the user. Raises InvalidRequest."""
    if isinstance(value, str):
        return [Message("user", value)]
    prompt = read_prompt(value)
    if not isinstance(prompt, Conversation) and not all(isinstance(each, Message) for each in prompt):
        raise InvalidRequest("messages must be Message objects or dicts with role and content.", param="messages")
    return prompt


def _messages(items: Sequence[ChatTurn]) -> Prompt:
    if all(isinstance(item, Message) for item in items):
        return [item for item in items if isinstance(item, Message)]
    turns = [{"role": item.role, "content": item.content} if isinstance(item, Message) else item for item in items]
    return Conversation(messages=tuple(read_message(turn, f"messages[{i}]") for i, turn in enumerate(turns)))


def _described(value: Any) -> str:
    return "None" if value is None else f"of the type {type(value).__name__}"
