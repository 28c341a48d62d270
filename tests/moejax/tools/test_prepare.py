"""The work of a prepared model is what the planner reads from its published configuration."""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from moejax.checkpoint.download import cache_folder
from moejax.checkpoint.families import read_config
from moejax.config.config_values import ConfigError
from moejax.tools.prepare import flops, prepare
from moejax.tools.rank_format import widening_note
from planner.inputs.published import MODELS, workload_from
from tests.support.models import DENSE
from tests.support.published import published_folder
from tests.support.quantized_folders import quantized_folders

NAMES = ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v2-lite", "deepseek-v3", "deepseek-v3.2", "glm-5", "llama-3.1-8b")


@pytest.mark.parametrize("name", NAMES)
def test_work_per_token_is_that_of_the_published_configuration(name: str) -> None:
    config = json.loads((MODELS / f"{name}.json").read_text())
    told, planned = flops(read_config(config, name=name)), workload_from(config)
    assert told["expert_flops"] == planned.expert_flops
    assert told["context_flops"] == planned.context_flops
    assert told["rest_flops"] == pytest.approx(planned.rest_flops, rel=1e-4)


def test_heads_that_cannot_be_sharded_are_refused_before_anything_is_converted(tmp_path: Path) -> None:
    folder = tmp_path / "never-converted"
    published_folder(folder)
    with pytest.raises(ConfigError, match="2 key/value heads of never-converted cannot be sharded over 3 ranks"):
        prepare(str(folder), "float32", "replicated", "3")
    assert not list((cache_folder() / "models").glob("never-converted-*"))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "as-published"
    for pattern in ("as-published-*", "as-published-plain-*"):
        for converted in (cache_folder() / "models").glob(pattern):
            shutil.rmtree(converted)


@pytest.mark.parametrize(
    ("dtype", "expected"), [(np.float32, "float32"), (ml_dtypes.bfloat16, "bfloat16"), (np.float16, "float32")]
)
def test_ranks_hold_a_published_model_in_the_narrowest_format_that_rounds_nothing(place, dtype, expected):
    published_folder(place, dtype=dtype)
    assert prepare(str(place), "published", "in-place")["weights"] == expected


@pytest.mark.parametrize("how", ["", "in-place"])
def test_widening_is_said_with_the_bytes_of_both(place, how, capfd):
    plain = quantized_folders(place, "int4")
    assert prepare(str(place), "published", how)["weights"] == "bfloat16"
    assert re.search(
        r"as-published is published in int4, 0\.\d MiB; ranks hold its weights in bfloat16, 0\.\d MiB",
        said := capfd.readouterr().err,
    )
    assert ("zero points, ordered groups, groups that are no multiple of 32 inputs, or scales" in said) == (
        how == "in-place"
    )
    assert prepare(str(plain), "published", how)["weights"] == "bfloat16"
    assert "ranks hold" not in capfd.readouterr().err


def test_a_model_without_experts_is_not_said_to_keep_some():
    config = json.loads((MODELS / "llama-3.1-8b.json").read_text())
    published = dataclasses.replace(workload_from(config), weight_format="int4", rest_bytes=1000)
    dense = dataclasses.replace(DENSE, weights="bfloat16")
    for in_place in (False, True):
        assert widening_note(dense, published, in_place=in_place).endswith(
            "Only experts stay in int4, and it has none."
        )


def test_experts_published_in_int4_stay_so_in_place_and_only_there(place, capfd):
    quantized_folders(place, "int4-32")
    narrow = prepare(str(place), "published", "in-place")
    said = capfd.readouterr().err
    assert "ranks hold its weights in int4-experts" in said  # attention of this folder is int4 too
    assert "--in-place" not in said
    wide = prepare(str(place), "published")
    assert "With --in-place, --data-type published keeps experts" in capfd.readouterr().err
    assert (narrow["weights"], wide["weights"]) == ("int4-experts", "bfloat16")
    numbers = 3 * 64 * 96
    padded = numbers + 64 * 32  # 96 inputs of down are one and a half pairs of groups
    assert (narrow["expert_bytes"], wide["expert_bytes"]) == (0.5625 * padded, 2 * numbers)
