"""A prepared model as JSON: the next front reads it back, under the keys of 0.1.0."""

import dataclasses
import json

import pytest

from serving.errors import InvalidRequest
from serving.protocol.prepared_model import PreparedModel, check_speculation
from simulation.hand_model import PREPARED


def test_json_gives_the_model_back_under_the_keys_of_0_1_0():
    model = dataclasses.replace(PREPARED, sharded_layers=(0, 2), stop_tokens=(1, 5))
    text = model.to_json()
    assert PreparedModel.from_json(text) == model
    assert json.loads(text)["divided_layers"] == [0, 2]
    assert "sharded_layers" not in json.loads(text)
    assert PreparedModel.from_json(json.dumps({**json.loads(text), "of_a_later_version": 1})) == model


@pytest.mark.parametrize(
    ("asked", "served", "told"),
    [(None, 64, "context of 64 tokens, within which"), (40, 40, ""), (64, 64, ""), (65, 65, "differ from those")],
)
def test_a_context_beyond_the_original_one_of_longrope_is_asked_for_and_said(asked, served, told):
    said: list[str] = []
    config = json.dumps({"max_context": 96, "name": "long"})
    model = dataclasses.replace(PREPARED, original_context=64, max_context=96, config=config)
    found = model.with_context(asked, said.append)
    assert (found.max_context, json.loads(found.config)) == (served, {"max_context": served, "name": "long"})
    assert bool(said) == bool(told)
    assert all(told in each for each in said)


def test_a_context_is_the_whole_of_a_model_without_longrope_and_never_longer():
    assert PREPARED.with_context(None, pytest.fail) == PREPARED
    assert PREPARED.with_context(50, pytest.fail) == dataclasses.replace(PREPARED, max_context=50)
    with pytest.raises(InvalidRequest, match=r"max_context is 97; .* was made for at most 96 tokens"):
        PREPARED.with_context(97, pytest.fail)


def test_a_model_whose_layers_keep_a_state_is_not_started_with_drafts():
    model = dataclasses.replace(PREPARED, state_bytes=64)
    check_speculation(model, "off")
    check_speculation(PREPARED, "ngram")
    with pytest.raises(InvalidRequest, match="speculate is ngram, and fake has layers whose context is a state"):
        check_speculation(model, "ngram")
