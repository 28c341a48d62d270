"""Sampling parameters that a caller leaves out are those of the model's `generation_config.json`."""

import json

import pytest

from serving.errors import StartError
from serving.protocol.sampling import SamplingDefaults, SamplingParams
from serving.text.generation_config import FILE, load_sampling_defaults


def defaults(folder, text: str) -> SamplingDefaults:
    (folder / FILE).write_text(text, "utf-8")
    return load_sampling_defaults(folder, vocab_size=100)


def resolved(params: SamplingParams, of: SamplingDefaults):
    return params.resolve(seed=1, room=50, vocab_size=100, model_stop_tokens=(), defaults=of)


def test_a_model_without_the_file_is_sampled_as_it_is(tmp_path):
    assert load_sampling_defaults(tmp_path, 100) == SamplingDefaults()
    assert defaults(tmp_path, '{"eos_token_id": 5, "do_sample": true, "temperature": null}') == SamplingDefaults()


def test_the_defaults_hold_where_the_caller_says_nothing(tmp_path):
    values = {"temperature": 0.2, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1, "max_new_tokens": 7}
    of = defaults(tmp_path, "\ufeff" + json.dumps(values))
    found = resolved(SamplingParams(), of)
    assert (found.temperature, found.top_p, found.top_k, found.repetition_penalty) == (0.2, 0.9, 20, 1.1)
    assert found.max_tokens == 7
    asked = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0, max_tokens=40)
    assert resolved(asked, of) == resolved(asked, SamplingDefaults())
    assert resolved(SamplingParams(), SamplingDefaults(max_tokens=1000)).max_tokens == 50


def test_minus_one_switches_top_k_off(tmp_path):
    assert defaults(tmp_path, '{"top_k": -1}').top_k == 0


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"temperature": "warm"}', '{"temperature": -1}', '{"top_p": 0}', '{"top_k": [5]}']
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, text):
    with pytest.raises(StartError, match=FILE):
        defaults(tmp_path, text)
