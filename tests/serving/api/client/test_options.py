"""The keyword arguments of the clients."""

import dataclasses

import numpy as np
import pytest

from serving.api.client.options import SamplingOptions, sampling_params
from serving.errors import InvalidRequest
from serving.protocol.sampling import SamplingParams, StructuredOutputs


def test_every_sampling_parameter_is_an_option_of_the_client():
    assert set(SamplingOptions.__annotations__) == {field.name for field in dataclasses.fields(SamplingParams)}


def test_options_of_the_call_are_no_sampling_parameters():
    assert sampling_params({"timeout_s": 1.0, "request_id": "r"}) == SamplingParams()


def test_plain_values_become_tuples():
    params = sampling_params({"stop": "x", "stop_tokens": [1, 2], "logit_bias": {3: 0.5}})
    assert params == SamplingParams(stop=("x",), stop_tokens=(1, 2), logit_bias=((3, 0.5),))


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="temprature"):
        sampling_params({"temprature": 1.0})


@pytest.mark.parametrize(("name", "meant"), [("guide", "structured_outputs"), ("max_token", "max_tokens")])
def test_an_option_of_another_name_is_said_with_the_name_that_is_meant(name, meant):
    with pytest.raises(TypeError, match=f"{name} is no option. Did you mean {meant}?"):
        sampling_params({name: 1})


def test_whole_numbers_are_those_of_any_library_and_nothing_else():
    assert sampling_params({"max_tokens": np.int32(3)}) == SamplingParams(max_tokens=3)
    for value in (3.5, "3", np.float32(3)):
        with pytest.raises(InvalidRequest, match="it must be a whole number") as caught:
            sampling_params({"max_tokens": value})
        assert caught.value.param == "max_tokens"


def test_a_json_schema_is_a_structured_output():
    assert sampling_params({"structured_outputs": {"type": "object"}}).structured_outputs == StructuredOutputs(
        "json", '{"type": "object"}'
    )
