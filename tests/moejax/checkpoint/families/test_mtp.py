"""The layer of multi-token prediction is read beside the model that it is published with, and only where it is asked
for."""

from pathlib import Path

import jax
import numpy as np
import pytest

from moejax.checkpoint.checkpoint import load_params
from moejax.checkpoint.convert import convert
from moejax.checkpoint.families import read_config
from moejax.checkpoint.manifest import CheckpointError
from moejax.checkpoint.published import check_mtp_packed
from moejax.checkpoint.published_store import PublishedStore, record_checksums
from moejax.checkpoint.safetensors import SafetensorsFolder
from moejax.config.config_values import ConfigError
from moejax.config.packed_form import PackedForm
from moejax.config.params import without_mtp
from tests.support.families.small import small_config
from tests.support.published import published_folder, random_tensors, write_shards


def quiet(done: int, total: int) -> None:
    pass


def folder_with_layer(source: Path, name: str) -> tuple[str, dict[str, np.ndarray]]:
    """Write a published folder with the layer. Returns the prefix of the layer's tensors, and all tensors."""
    published_folder(source, small_config(name, num_nextn_predict_layers=1))
    cfg = read_config(source, mtp=True)
    tensors, layer = random_tensors(cfg, np.float32), f"model.layers.{cfg.n_layers}."
    copies = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    tensors |= {layer + name: tensors[of] for name, of in copies.items() if of in tensors}
    write_shards(source, tensors, 2)
    return layer, tensors


@pytest.mark.parametrize("name", ["deepseek-v3", "kimi-k2", "glm-4-moe"])
def test_it_is_read_beside_a_model_that_stays_the_same(name, tmp_path):
    layer, tensors = folder_with_layer(tmp_path / "hf", name)
    cfg = convert(tmp_path / "hf", tmp_path / "with", on_progress=quiet, mtp=True)
    convert(tmp_path / "hf", tmp_path / "without", on_progress=quiet)
    params = load_params(tmp_path / "with")
    for leaf, tensor in (
        (params.mtp.token_norm, "enorm.weight"),
        (params.mtp.hidden_norm, "hnorm.weight"),
        (params.mtp.project, "eh_proj.weight"),
        (params.mtp.norm, "shared_head.norm.weight"),
        (params.segments[-1][0].attention_norm[0], "input_layernorm.weight"),
        (params.segments[-1][0].moe.router[0], "mlp.gate.weight"),
        (params.segments[-1][0].moe.experts.down[0, 3], "mlp.experts.3.down_proj.weight"),
    ):
        np.testing.assert_array_equal(leaf, tensors[layer + tensor])
    jax.tree.map(np.testing.assert_array_equal, without_mtp(params), load_params(tmp_path / "without"))
    record_checksums(tmp_path / "hf", tmp_path / "in-place", name="model", on_progress=quiet, mtp=True)
    store, last = PublishedStore.open(tmp_path / "in-place"), cfg.n_moe_layers - 1
    down = store.read_experts([(last, 3)])[last, 3][1]
    np.testing.assert_array_equal(down, params.segments[-1][0].moe.experts.down[0, 3])
    np.testing.assert_array_equal(store.non_expert_params().mtp.project, params.mtp.project)


def test_a_copy_without_the_weights_of_its_layer_is_refused_with_the_way_out(tmp_path):
    published_folder(tmp_path / "hf", small_config("deepseek-v3", num_nextn_predict_layers=1))
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.3\.enorm\.weight.*--speculate ngram"):
        convert(tmp_path / "hf", tmp_path / "out", on_progress=quiet, mtp=True)
    convert(tmp_path / "hf", tmp_path / "out", on_progress=quiet)


@pytest.mark.parametrize(
    ("name", "layers", "error"),
    [
        ("deepseek-v3", 0, "has 0 layers of multi-token prediction, and 1 is served"),
        ("deepseek-v3", 2, "has 2 layers of multi-token prediction, and 1 is served"),
        ("mixtral", 1, "of model_type 'mixtral' is not served yet; that of deepseek_v3, glm4_moe"),
    ],
)
def test_a_model_whose_layer_is_not_served_is_refused(name, layers, error):
    with pytest.raises(ConfigError, match=error) as caught:
        read_config(small_config(name, num_nextn_predict_layers=layers), name="model", mtp=True)
    assert "Serve it with --speculate ngram or off." in str(caught.value)


def test_a_layer_of_another_form_than_packed_experts_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    source = tmp_path / "hf"
    drafting, _ = folder_with_layer(source, "deepseek-v3")
    check_mtp_packed(source)
    form = PackedForm(scale="bfloat16", group=32)
    monkeypatch.setattr(SafetensorsFolder, "packed", lambda _, name: None if name.startswith(drafting) else form)
    with pytest.raises(CheckpointError, match=r"layer of multi-token prediction in another form.*--speculate ngram"):
        check_mtp_packed(source)
    monkeypatch.setattr(SafetensorsFolder, "packed", lambda _, name: form)
    check_mtp_packed(source)
