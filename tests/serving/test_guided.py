"""Guides: an answer drawn under its masks is what it must be, and a mask depends on the tokens so far alone."""

import json
import re

import numpy as np
import pytest

from serving.batch import Shaped
from serving.errors import InvalidRequest
from serving.guided import Guides
from serving.request import Guide
from serving.tools import ToolCall, ToolCalls, calling
from tests.fake_backend import MODEL
from tests.fakes import small_request

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": -9, "maximum": 999}, "b": {"enum": ["x", "é"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
GUIDES = [
    Guide("json", json.dumps(SCHEMA)),
    Guide("regex", "[0-9]{2}-(ab|cd)+"),
    Guide("choice", json.dumps(["yes", 'n"o', "may\nbe"])),
    calling([{"type": "function", "function": {"name": "add", "parameters": SCHEMA}}]),
]
STOP = MODEL.stop_tokens[0]


@pytest.fixture
def guides(tokenizer) -> Guides:
    return Guides(tokenizer, MODEL.vocab_size, MODEL.stop_tokens)


def allowed(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def drawn(guides: Guides, guide: Guide, seed: int, most: int = 400) -> list[int]:
    """Tokens drawn at random under the masks, until a stop token."""
    rng, tokens, request = np.random.default_rng(seed), [], small_request(f"r{seed}", guide=guide)
    while len(tokens) < most:
        token = int(rng.choice(allowed(guides.mask(Shaped(request, tuple(tokens))))))
        if token == STOP:
            return tokens
        tokens.append(token)
    raise AssertionError("the answer does not end")


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.kind)
@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_drawn_under_a_guide_follows_it(guides, tokenizer, guide, seed):
    guides.check(guide)
    text = tokenizer.decode(drawn(guides, guide, seed))
    if guide.kind == "regex":
        assert re.fullmatch(guide.text, text)
    elif guide.kind == "choice":
        assert text in json.loads(guide.text)
    else:
        if guide.kind == "lark":
            (call,) = [*ToolCalls().push(text)]
            assert isinstance(call, ToolCall)
            text = call.arguments
        value = json.loads(text)
        assert isinstance(value["a"], int)
        assert value["b"] in ("x", "é")


def test_a_mask_is_the_same_whatever_was_asked_before(guides, tokenizer):
    request = small_request("a", guide=GUIDES[1])
    tokens = tuple(b"12-abcd")
    in_turn = [guides.mask(Shaped(request, tokens[:n])).tolist() for n in range(len(tokens) + 1)]
    for n in (7, 2, 5, 0):  # out of order, as after a failure; and by one who never saw it
        assert guides.mask(Shaped(request, tokens[:n])).tolist() == in_turn[n]
        fresh = Guides(tokenizer, MODEL.vocab_size, MODEL.stop_tokens)
        assert fresh.mask(Shaped(request, tokens[:n])).tolist() == in_turn[n]


def test_where_nothing_can_follow_only_the_end_can(guides):
    request = small_request("a", guide=Guide("choice", '["a"]'))
    assert allowed(guides.mask(Shaped(request, (97,)))) == [STOP]
    assert allowed(guides.mask(Shaped(request, (98,)))) == [STOP]  # never drawn under the mask


@pytest.mark.parametrize(
    ("guide", "param"),
    [
        (Guide("regex", "("), "regex"),
        (Guide("json", '{"type": "nothing"}'), "response_format"),
        (Guide("json", "{"), "response_format"),
        (Guide("lark", "start: missing"), "structured_outputs"),
        (Guide("regex", "a" * 100_001), "regex"),
    ],
)
def test_what_is_no_guide_is_refused_by_name(guides, guide, param):
    with pytest.raises(InvalidRequest) as caught:
        guides.check(guide)
    assert caught.value.param == param


def test_a_model_that_cannot_stop_cannot_be_guided(tokenizer):
    with pytest.raises(InvalidRequest, match="no stop token"):
        Guides(tokenizer, MODEL.vocab_size, ()).check(GUIDES[0])
