"""The keyword arguments of the clients."""

import dataclasses

import pytest

from serving.api.client.options import SamplingOptions, sampling_params
from serving.protocol.sampling import SamplingParams


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
