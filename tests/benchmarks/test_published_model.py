"""A model written as published has the numbers that it had, as this repository's own reader of published folders finds
them."""

import dataclasses

import jax
import numpy as np
import pytest

from benchmarks.published_model import write_published
from moejax.checkpoint.checkpoint import load_params
from moejax.checkpoint.convert import convert
from moejax.config.config_values import ConfigError
from simulation.byte_tokenizer import byte_tokenizer
from tests.support.models import DENSE, MIXTRAL, model_folder

PLAIN = dataclasses.replace(MIXTRAL, stop_tokens=(0,))


def test_the_folder_reads_as_the_same_model(tmp_path):
    model_folder(tmp_path / "m", PLAIN)
    (tmp_path / "m/tokenizer.json").write_text(byte_tokenizer().format.inner.to_str())
    write_published(tmp_path / "m", tmp_path / "published", "float32")
    convert(tmp_path / "published", tmp_path / "again", on_progress=lambda *_: None)
    was, now = (load_params(tmp_path / name) for name in ("m", "again"))
    was.segments[0][0].moe.bias[...] = 0  # it only breaks ties
    for before, after in zip(jax.tree.leaves(was), jax.tree.leaves(now), strict=True):
        np.testing.assert_array_equal(np.asarray(after, np.float32), before)


@pytest.mark.parametrize(
    ("cfg", "why"),
    [(DENSE, "only 'moe' is written"), (dataclasses.replace(MIXTRAL, clip_qkv=1.0), "no Mixtral in clip_qkv")],
)
def test_what_a_mixtral_cannot_say_is_refused(tmp_path, cfg, why):
    model_folder(tmp_path / "m", cfg)
    with pytest.raises(ConfigError, match=why):
        write_published(tmp_path / "m", tmp_path / "p", "float32")
