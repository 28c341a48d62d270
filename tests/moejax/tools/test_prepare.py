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
from moejax.tools.inspect import describe
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
    assert "groups in the order of the inputs and of a multiple of 32 of them" in said
    assert prepare(str(plain), "published", how)["weights"] == "bfloat16"
    assert "ranks hold" not in capfd.readouterr().err


def test_a_model_that_is_widened_is_said_to_be_with_the_reason():
    config = json.loads((MODELS / "llama-3.1-8b.json").read_text())
    published = dataclasses.replace(workload_from(config), weight_format="int4", rest_bytes=1000)
    dense = dataclasses.replace(DENSE, weights="bfloat16")
    assert "Without --dense sharded" in widening_note(dense, published, sharded=True)
    assert "in groups" not in widening_note(dense, dataclasses.replace(published, weight_format="fp8"))


def test_matrices_published_in_int4_stay_so_unless_another_type_is_asked_for(place):
    quantized_folders(place, "int4-32")
    narrow, wide = prepare(str(place), "published"), prepare(str(place), "bfloat16")
    assert (narrow["weights"], wide["weights"]) == ("published-int4", "bfloat16")
    assert describe(str(place), weights="published")["expert_bytes"] == narrow["expert_bytes"]
    assert [tuple(part.split()[-2:]) for part in json.loads(str(narrow["config"]))["packed"]["parts"]] == [
        ("ffn", "model"),
        ("model", "ffn"),
        ("heads", "model"),
        ("model", "heads"),
    ]
    in_group = prepare(str(place), "published", "", "2")  # heads are sharded as bfloat16
    assert in_group["expert_bytes"] == narrow["expert_bytes"]
    assert in_group["rest_bytes"] == wide["rest_bytes"] > narrow["rest_bytes"]
    numbers = 3 * 64 * 96
    padded = numbers + 64 * 32  # 96 inputs of down are one and a half pairs of groups
    assert (narrow["expert_bytes"], wide["expert_bytes"]) == (padded / 2 + numbers / 16, 2 * numbers)


@pytest.mark.parametrize(("form", "held"), [("fp8-block", "fp8"), ("int8", "published-int8")])
def test_matrices_published_in_eight_bits_stay_so_and_new_weights_are_of_their_form(place, form, held, capfd):
    plain = quantized_folders(place, form)
    narrow = prepare(str(place), "published")
    assert "in bfloat16" not in capfd.readouterr().err
    wide = prepare(str(place), "bfloat16")
    assert narrow["weights"] == describe(str(place), weights="published")["config"]["weights"] == held
    numbers = 3 * 64 * 96
    assert wide["expert_bytes"] == 2 * numbers
    assert 1 < narrow["expert_bytes"] / numbers < 1.06  # scales in float32 of rows of 64 numbers
    assert narrow["rest_bytes"] < wide["rest_bytes"]
    new = (held, "replicated", "1", "float32", str(narrow["folder"]))
    assert prepare(str(place), *new)["content"] == narrow["content"]
    with pytest.raises(ConfigError, match=rf"is held in bfloat16 .* in {held}\. Publish .*moejax serve --model"):
        prepare(str(plain), *new)


def test_new_weights_of_a_packed_model_are_of_its_form(place):
    plain = quantized_folders(place, "int4-32")
    served = prepare(str(place), "published")

    def bring_in(form: str) -> dict[str, object]:
        other = place.with_name(f"as-published-{form}") if form else plain
        if form:
            quantized_folders(other, form, seed=1)
        return prepare(str(other), "published-int4", "replicated", "1", "float32", str(served["folder"]))

    same = bring_in("int4-32")
    both = [json.loads(str(each["config"])) | {"name": ""} for each in (same, served)]
    assert both[0] == both[1]
    assert same["content"] != served["content"]
    with pytest.raises(ConfigError, match=r"with float16 scales of 32 inputs, zero .* with bfloat16 scales of 32 "):
        bring_in("awq")
    with pytest.raises(ConfigError, match=r"is held in bfloat16 .* in published-int4\. Publish .*moejax serve --model"):
        bring_in("")
    with pytest.raises(ConfigError, match=r"of all inputs \(.*, and the served model is .* of 32 inputs \(.*moejax"):
        bring_in("int4-rows")
