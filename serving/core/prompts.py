"""Prompts as callers give them - text, tokens, messages or a conversation with tools - and their tokens."""

import asyncio
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from serving.errors import InvalidRequest
from serving.text.tokenizer import Message, Tokenizer
from serving.text.validation import check_roles, check_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages as a chat template takes them, `tools` that the model may call, several at once if
    `parallel_tool_calls`, and other `variables` of the template."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    parallel_tool_calls: bool = True


class BareText(str):
    """A text whose tokens are its own alone: none that the tokenizer puts before every text, such as BOS."""

    __slots__ = ()


Prompt = str | Sequence[int] | Sequence[Message] | Conversation

_LONG_TEXT = 20_000
"""Characters from which a prompt is encoded in a thread, so that other streams do not wait for it."""


class PromptEncoder:
    """Encodes prompts of every form with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The tokens of a prompt. Raises InvalidRequest, with `param` naming the field."""
        if isinstance(prompt, str):
            if not prompt:
                raise InvalidRequest("the prompt is empty. Send at least one character.", param="prompt")
            encode = functools.partial(self._tokenizer.encode, special=not isinstance(prompt, BareText))
            return self._checked(await _in_thread_if_long(len(prompt), encode, prompt))
        if isinstance(prompt, Conversation):
            return await self._encode_conversation(prompt)
        if not prompt:
            raise InvalidRequest("the prompt is empty. Send at least one token or message.", param="prompt")
        if isinstance(prompt[0], Message):
            messages = cast(Sequence[Message], prompt)
            check_roles([message.role for message in messages])
            length = sum(len(m.content) for m in messages)
            return self._checked(await _in_thread_if_long(length, self._tokenizer.chat, messages), "messages")
        ids = tuple(cast(Sequence[int], prompt))
        check_tokens(ids, self._vocab_size, "prompt")
        return ids

    async def _encode_conversation(self, prompt: Conversation) -> tuple[int, ...]:
        if not prompt.messages:
            raise InvalidRequest("there are no messages. Send at least one.", param="messages")
        check_roles([str(message["role"]) for message in prompt.messages])

        def encode(tools: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
            return self._tokenizer.chat(prompt.messages, tools=tools or None, variables=prompt.variables)

        length = sum(len(str(message.get("content") or "")) for message in prompt.messages)
        tokens = await _in_thread_if_long(length, encode, prompt.tools)
        if prompt.tools and tokens == await _in_thread_if_long(length, encode, ()):
            raise InvalidRequest(
                "the chat template of this model has no place for tools. Start the server with a template that has, "
                "with --chat-template FILE.",
                param="tools",
            )
        return self._checked(tokens, "messages")

    def _checked(self, tokens: tuple[int, ...], param: str = "prompt") -> tuple[int, ...]:
        """The tokens of a text, which may name a token that was added to the tokenizer and not to the model."""
        beyond = next((token for token in tokens if token >= self._vocab_size), None)
        if beyond is None:
            return tokens
        raise InvalidRequest(
            f"the text has the token {self._tokenizer.format.token(beyond)!r} ({beyond}), which the tokenizer knows "
            f"and the model does not: its vocabulary has {self._vocab_size} tokens. Leave it out.",
            param=param,
        )


async def _in_thread_if_long(length: int, encode: Callable[[Any], tuple[int, ...]], text: Any) -> tuple[int, ...]:
    """`encode(text)`; in a thread when the text is long."""
    if length > _LONG_TEXT:
        return await asyncio.to_thread(encode, text)
    return encode(text)
