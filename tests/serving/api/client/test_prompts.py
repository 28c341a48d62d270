"""Prompts as callers write them."""

import re

import numpy as np
import pytest

from serving.api.client.prompts import read_chat, read_prompt
from serving.core.prompts import Conversation
from serving.errors import InvalidRequest
from serving.text.tokenizer import Message

TURN = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    "ids", [[1, 2], (1, 2), np.array([1, 2]), np.array([1, 2], np.uint16), range(1, 3), iter([1, 2])]
)
def test_token_ids_may_come_in_any_sequence(ids):
    prompt = read_prompt(ids)
    assert prompt == (1, 2)
    assert all(type(each) is int for each in prompt)


def test_text_messages_and_conversations_stay_as_they_are():
    for prompt in ("hi", "", [Message("user", "hi")], Conversation(messages=(TURN,))):
        assert read_prompt(prompt) == prompt


@pytest.mark.parametrize("read", [read_prompt, read_chat])
def test_messages_may_be_dicts_also_among_others(read):
    for messages in ([TURN], [Message("user", "hi"), TURN, TURN | {"content": [{"type": "text", "text": "hi"}]}]):
        prompt = read(messages)
        assert isinstance(prompt, Conversation)
        assert [(turn["role"], turn["content"]) for turn in prompt.messages] == [("user", "hi")] * len(messages)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (None, "the prompt is None"),
        (5, "of the type int"),
        (b"x", "of the type bytes"),
        (TURN, "of the type dict"),
        (["one", "two"], "a list of 2 texts, but a call has one prompt"),
        ([1, 2.5], "an item that is of the type float"),
        ([1, None], "an item that is None"),
        (np.array([1.0]), "float64"),
        (np.array([[1, 2]]), "ndarray"),
        ([{"content": "hi"}], "messages[0].role is"),
    ],
)
def test_what_is_no_prompt_is_one_clear_error(prompt, text):
    with pytest.raises(InvalidRequest, match=re.escape(text)):
        read_prompt(prompt)


def test_a_conversation_is_no_list_of_tokens():
    with pytest.raises(InvalidRequest, match="must be Message objects or dicts"):
        read_chat([1, 2])  # pyright: ignore[reportArgumentType]
