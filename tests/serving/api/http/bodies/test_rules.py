"""The rule about fields: used, accepted, refused, ignored."""

from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.api.http.bodies.chat import ChatBody
from serving.api.http.bodies.completion import CompletionBody
from serving.api.http.bodies.decoding import decode_body
from serving.api.http.bodies.rules import accepted, field_rules, ignored, refused, used
from serving.errors import InvalidRequest


class Inner(msgspec.Struct, kw_only=True):
    size: Annotated[int | None, used("A number.")] = None
    text: Annotated[str | None, used("The text.")] = None
    label: Annotated[Any, ignored("a label", [])] = None


class Body(msgspec.Struct, kw_only=True):
    number: Annotated[int | None, used("A number.")] = None
    inner: Annotated[Inner | None, used("Inside.")] = None
    parts: Annotated[list[str | Inner] | None, used("Parts.")] = None
    ids: Annotated[str | list[int | list[int]] | None, used("Numbers.")] = None
    neutral: Annotated[Any, accepted("it cannot be done", False, [])] = None
    never: Annotated[Any, refused("it does not exist")] = None
    hint: Annotated[Any, ignored("a hint", 1)] = None


def paths(raw: dict[str, Any], **options: Any) -> tuple[str, ...]:
    return decode_body(raw, Body, **options)[1]


def test_what_is_done_anyway_is_accepted_and_what_cannot_be_done_is_refused_with_its_path():
    assert paths({"neutral": False, "number": 1}) == paths({"neutral": []}) == paths({"neutral": None}) == ()
    for raw, path in (
        ({"neutral": True}, "neutral"),
        ({"neutral": 0}, "neutral"),  # which is not false
        ({"never": False}, "never"),
    ):
        with pytest.raises(InvalidRequest, match="is not supported by this server") as caught:
            paths(raw)
        assert caught.value.param == path


def test_hints_and_unknown_fields_are_ignored_at_any_depth_and_named_by_their_paths():
    raw = {
        "hint": 2,
        "other": 1,
        "inner": {"text": "x", "label": "y", "more": {}},
        "parts": ["a", {"label": []}, {"far": True}],
    }
    assert paths(raw) == ("hint", "other", "inner.label", "inner.more", "parts[2].far")
    assert paths({"hint": 1, "other": None, "inner": {"label": [], "more": None}}) == ()


def test_a_strict_server_refuses_unknown_fields_and_names_the_nearest():
    assert paths({"hint": 2}, strict=True) == ("hint",)
    with pytest.raises(InvalidRequest, match=r"unknown field 'numbr'. Did you mean 'number'\?") as caught:
        paths({"numbr": 1}, strict=True)
    assert caught.value.param == "numbr"
    with pytest.raises(InvalidRequest, match=r"unknown field 'parts\[0\].far'"):
        paths({"parts": [{"far": 1}]}, strict=True)


@pytest.mark.parametrize("model", [CompletionBody, ChatBody])
def test_every_field_of_a_body_says_what_happens_to_it(model):
    rules = field_rules(model)
    assert all(rule.why for rule in rules.values())
    assert {rule.treatment for rule in rules.values()} >= {"used", "accepted", "ignored"}
    for name, rule in rules.items():  # a value that is documented as neutral is silent
        for value in rule.neutral:
            assert rule.is_neutral(value), name


def test_whole_numbers_may_have_a_fraction_at_any_depth():
    raw = {"number": 3.0, "inner": {"size": 2.0}, "parts": ["a", {"size": 1.0}], "ids": [1.0, [2.0, 3], 4.0]}
    body, _ = decode_body(raw, Body)
    assert body == Body(number=3, inner=Inner(size=2), parts=["a", Inner(size=1)], ids=[1, [2, 3], 4])
    assert isinstance(body.number, int)
    for wrong, path in (
        ({"number": 3.5}, "number"),
        ({"ids": [1.0, [2.0, 2.5]]}, "ids[1][1]"),
        ({"parts": [{"size": 1.0}, {"size": "1"}]}, "parts[1].size"),
    ):
        error = refusal(wrong)
        assert error is not None
        assert error.param == path
    assert decode_body({"ids": [[1.0]] * 1000}, Body)[0].ids == [[1]] * 1000
    many = refusal({"parts": [{"size": 1.0} for _ in range(1000)]})
    assert many is not None
    assert "more than 32 integers are written with a fraction" in str(many)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["number", "inner", "parts", "neutral", "hint", "text", "x"]), JSON))
def test_any_object_is_decoded_or_refused_with_a_path(raw):
    error = refusal(raw)
    assert error is None or error.param.startswith(tuple(raw))


def refusal(raw: dict[str, Any]) -> InvalidRequest | None:
    try:
        paths(raw)
    except InvalidRequest as error:
        return error
    return None
