"""Laws of folders in Mistral's own format: the same model as the folder that transformers writes, whatever the form of
its weights; what cannot be so is named by its field."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moejax.checkpoint.convert import convert
from moejax.checkpoint.families import read_config
from moejax.checkpoint.manifest import CheckpointError
from moejax.checkpoint.published import open_published
from moejax.checkpoint.safetensors import OWN_INDEX, SafetensorsFolder
from moejax.config.config_values import ConfigError
from moejax.tools.changed_tensors import change
from moejax.tools.resolve import is_published
from planner.inputs.published import published_model, read_config_values
from planner.inputs.published.mistral_format import FAMILY, FILE, params_values
from tests.parity.programs import load_folder
from tests.support.families.published import ALL
from tests.support.families.small import small_folder, transformers_folder

NAMES = [name for name, case in ALL.items() if case.family == FAMILY]
LATENT, PLAIN = NAMES[0], "mistral_format, one"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The folder of the model with latent attention."""
    small_folder(tmp_path / "own", LATENT)
    return tmp_path / "own"


def rewritten(folder: Path, **changes: object) -> None:
    """The folder with other fields in its params.json; None removes one."""
    values = json.loads((folder / FILE).read_text()) | changes
    (folder / FILE).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_model_that_transformers_writes(name, tmp_path):
    small_folder(tmp_path / "own", name)
    transformers_folder(tmp_path / "theirs", name)
    cfg, theirs = (read_config(tmp_path / each, name="m") for each in ("own", "theirs"))
    assert dataclasses.replace(cfg, family=theirs.family) == theirs
    expected, found = load_folder(tmp_path / "theirs", theirs), load_folder(tmp_path / "own", cfg)
    jax.tree.map(np.testing.assert_array_equal, expected, found)


def test_config_json_decides_only_over_weights_of_its_own(own, tmp_path):
    transformers_folder(tmp_path / "theirs", LATENT)
    for file in (tmp_path / "theirs").iterdir():
        if not file.name.startswith("model"):
            shutil.copy(file, own)
    assert read_config(own).family == FAMILY
    assert open_published(own)[0].family == FAMILY
    for file in (tmp_path / "theirs").glob("model*"):
        shutil.copy(file, own)
    assert open_published(own)[0].family == "mistral4"
    assert is_published(own)


def test_scales_of_a_tensor_are_multiplied_in_and_those_of_activations_are_left(own, tmp_path):
    draw, expected = np.random.default_rng(0), {}
    for file in own.glob("*.safetensors"):
        tensors = load_file(file)
        for name, array in list(tensors.items()):
            if array.ndim == 2 and "gate." not in name and name.startswith("layers."):
                stem = name.removesuffix("weight")
                scale = draw.uniform(0.5, 2, () if "experts" in name else (len(array), 1)).astype(np.float32)
                tensors |= {name: array.astype(ml_dtypes.float8_e4m3fn), f"{stem}qscale_weight": scale}
                tensors[f"{stem}qscale_act"] = np.float32(draw.uniform())
                expected[name] = (tensors[name].astype(np.float32) * scale).astype(ml_dtypes.bfloat16)
        save_file({name: np.asarray(array) for name, array in tensors.items()}, file)
    (own / OWN_INDEX).unlink()
    rewritten(own, dtype=None, quantization={"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"})
    weights = SafetensorsFolder.open(own)
    assert weights.names() >= set(expected)
    assert {weights.form(name) for name in expected} == {"fp8"}
    for name, array in expected.items():
        np.testing.assert_array_equal(weights.read(name), array)
    assert len(weights.unused) == len(expected)
    form = published_model(read_config_values(own)).form
    assert (form.format, form.experts, form.attention, form.shared, form.base) == ("fp8", 1.0, 1.0, 1.0, 2.0)
    cfg = convert(own, tmp_path / "out", on_progress=lambda done, total: None)
    assert cfg == dataclasses.replace(read_config(own), name=cfg.name)


def test_changed_tensors_keep_the_format(own, tmp_path):
    tensors = SafetensorsFolder.open(own)
    name = "layers.1.experts.0.w1.weight"
    new = tensors.read(name) + 1
    (tmp_path / "changes").mkdir()
    (tmp_path / "changes" / "data").write_bytes(new.tobytes())
    (tmp_path / "changes" / "tensors.json").write_text(json.dumps({name: (new.dtype.name, new.shape, 0)}))
    change(own, tmp_path / "changes", tmp_path / "v1")
    cfg, found = open_published(tmp_path / "v1")
    assert cfg.family == FAMILY
    for each in tensors.names():
        np.testing.assert_array_equal(found.read(each), new if each == name else tensors.read(each))


def test_every_text_begins_with_the_begin_token_unless_the_files_say_otherwise(own):
    assert read_config(own).bos_token is None
    (own / "tokenizer_config.json").unlink()
    assert (read_config(own).bos_token, read_config(own).stop_tokens) == (1, (2,))


def test_a_tensor_and_a_file_that_are_missing_are_named(own):
    file = json.loads((own / OWN_INDEX).read_text())["weight_map"]["output.weight"]
    tensors = load_file(own / file)
    del tensors["output.weight"]
    save_file(tensors, own / file)
    with pytest.raises(CheckpointError, match=r"tensor output\.weight of shape \(272, 64\) is missing"):
        open_published(own)
    (own / file).unlink()
    with pytest.raises(CheckpointError, match=rf"{file} is missing; {OWN_INDEX} lists 2 files"):
        open_published(own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": None}, r"params\.json: dim is missing"),
        ({"n_layers": "3"}, r"params\.json: n_layers is '3'; it must be a whole number"),
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"activation": "gelu"}, "activation is 'gelu'; only 'silu' is served"),
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        ({"moe": None}, "qk_nope_head_dim is given, but no num_shared_experts of moe"),
        ({"moe": {"num_experts": 4}}, "qk_nope_head_dim is given, but no num_shared_experts of moe"),
        ({"moe": {"num_shared_experts": 1}}, r"params\.json, moe: expert_hidden_dim is missing"),
        ({"moe": {"num_expert_groups": 4}}, "moe: num_expert_groups is 4; only 1 is served"),
        ({"moe": {"route_every_n": 2}}, "moe: route_every_n is 2; only 1 is served"),
        ({"moe": {"use_load_balancing_bias": True}}, "use_load_balancing_bias is True; only False is served"),
        ({"yarn": {"factor": 2, "truncate": False}}, "yarn: truncate is not known; known are original_max_position_e"),
        ({"llama_4_scaling": {"beta": 0.1}}, "llama_4_scaling: original_max_position_embeddings is missing"),
    ],
)
def test_what_is_not_served_or_missing_is_named_by_its_field(change, message, own):
    rewritten(own, **change)
    with pytest.raises(ConfigError, match=message):
        read_config(own)


def test_a_quantization_that_is_not_known_is_named(own):
    rewritten(own, quantization={"qformat_weight": "int7"})
    with pytest.raises(CheckpointError, match="quantization 'int7' is not known"):
        SafetensorsFolder.open(own)


def params(name: str, tmp_path: Path, **changes: object):
    small_folder(tmp_path / "m", name)
    return published_model(params_values(json.loads((tmp_path / "m" / FILE).read_text()) | changes))


def test_the_context_is_the_smaller_length(tmp_path):
    assert params(LATENT, tmp_path, max_position_embeddings=294_912, max_seq_len=262_144).context == 262_144


def test_windows_repeat(tmp_path):
    assert params(PLAIN, tmp_path, n_layers=4, sliding_window=[None, 20]).windows == (None, 20, None, 20)
    with pytest.raises(Exception, match="sliding_window has 2 entries, and n_layers, 3, is no multiple"):
        params(PLAIN, tmp_path, sliding_window=[None, 20])
    with pytest.raises(Exception, match="sliding_window is 0; it must be a whole number"):
        params(PLAIN, tmp_path, sliding_window=0)
