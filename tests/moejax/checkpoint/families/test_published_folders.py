"""Laws of published folders of every family: whole ones become ours and say what transformers says, in every form of
weights; broken ones are named before anything is written."""

import dataclasses
import itertools
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from moejax.checkpoint.checkpoint import load_params
from moejax.checkpoint.convert import convert
from moejax.checkpoint.families import array_sources, read_config
from moejax.checkpoint.host_store import HostStore
from moejax.checkpoint.manifest import CheckpointError
from moejax.config.params import is_spec, named_tensors, param_specs
from moejax.config.weight_formats import Int8, dequantize, to_weight_format
from moejax.model.reference import logits
from moejax.tools.inspect import describe
from planner.inputs.published.mistral_format import config_file
from serving.engine.batch import StepBucket
from tests.parity.programs import load_folder
from tests.support.families.answers import PROMPT, recorded
from tests.support.families.mistral_format import write_config
from tests.support.families.published import ALL, CASES
from tests.support.families.small import small_config, small_folder
from tests.support.stepping import Stepper, work

CACHE = {"mixtral": 3 * 2 * 2 * 16, "deepseek-v3": 3 * (8 + 24), "gpt-oss": 4 * 2 * 2 * 24, "llama 3.1": 3 * 2 * 2 * 16}
"""Numbers kept for a token: layers x (keys and values x heads x size), or layers x (rotated key + latent)."""
TOLD = (
    "mixtral, window",
    "llama 3.1",
    "qwen2-moe",
    "deepseek-v3",
    "gpt-oss",
    "granite-moe",
    "phi-3.5-moe, long",
    "llama4",
    "afmoe",
)
BY_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "num_attention_heads_per_layer", "swiglu_limits")
BY_LAYER += ("swiglu_limits_shared",)
"""Fields of published configurations that have an entry for each layer."""
IN_FORMS = (("deepseek-v3", "int8"), ("gpt-oss", "int8"), ("qwen2-moe", "bfloat16"))
ROUNDING = {"bfloat16": 1e-4, "int8": 3e-2}
"""Of a step, against float32: sums in another order; with int8, rows of 16 bits in every dot, which lively weights make
more of (seen: 1e-2)."""


def quiet(done: int, total: int) -> None:
    pass


@pytest.mark.parametrize("name", [name if name in TOLD else pytest.param(name, marks=pytest.mark.slow) for name in ALL])
def test_a_whole_folder_becomes_ours_and_says_what_transformers_says(name, tmp_path):
    small_folder(tmp_path / "hf", name)
    cfg = convert(tmp_path / "hf", tmp_path / "out", on_progress=quiet)
    expected, params = load_folder(tmp_path / "hf", cfg), load_params(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, expected, params)
    answer = recorded(name)
    said = np.asarray(logits(params, cfg, np.array([answer.prompt + answer.tokens])))[0, PROMPT - 1 : -1]
    assert said.argmax(-1).tolist() == answer.tokens


@pytest.mark.parametrize("name", CASES)
def test_it_is_described_the_same_before_and_after(name, tmp_path):
    tensors = small_folder(tmp_path / "hf", name)
    convert(tmp_path / "hf", tmp_path / "hf-out", on_progress=quiet)
    before, after = describe(str(tmp_path / "hf")), describe(str(tmp_path / "hf-out"))
    assert before["weights"]["bytes"] == sum(a.nbytes for a in tensors.values())
    assert before["weights"]["bytes"] == 4 * before["parameters"]
    assert before["cache_bytes_per_token"] == 4 * CACHE.get(name, before["cache_bytes_per_token"] // 4)
    assert before["plan"]["bytes_per_rank"] > 0
    same = before.keys() - {"name", "weights", "config"}
    assert {key: after[key] for key in same} == {key: before[key] for key in same}


@pytest.mark.parametrize("name", CASES)
def test_the_store_gives_each_expert_alone(name, tmp_path):
    small_folder(tmp_path / "hf", name)
    cfg = convert(tmp_path / "hf", tmp_path / "out", on_progress=quiet)
    store, params = HostStore.open(tmp_path / "out"), load_params(tmp_path / "out")
    experts = cfg.moe.experts if cfg.moe else 0
    wanted = [(layer, expert) for layer in range(cfg.n_moe_layers) for expert in range(experts)]
    read = store.read_experts(wanted)
    layers = [
        jax.tree.map(lambda leaf, at=repeat: leaf[at], segment[j].moe.experts)
        for (pattern, repeats), segment in zip(cfg.segments, params.segments, strict=True)
        for repeat in range(repeats)
        for j, kind in enumerate(pattern)
        if kind == "moe"
    ]
    for layer, expert in wanted:
        ours = [leaf[expert] for leaf in jax.tree.leaves(layers[layer])]
        for ours_part, part in zip(ours, read[layer, expert], strict=True):
            np.testing.assert_array_equal(ours_part, part)


SIZES = {"vocab_size", "d_model", "d_ff", "max_context", "stop_tokens", "bos_token", "name"}
FIXED = {
    "weights",
    "packed",
    "shard_dense",
    "mtp",
    "cache_format",
    "tensor",
    "swiglu_alpha",
    "low_frequency",
    "high_frequency",
    "beta_fast",
    "beta_slow",
    "norm_eps",
}
"""Chosen by who serves, fixed in what is compared with, or numbers without a branch."""


def test_every_choice_that_a_configuration_has_is_made_in_more_than_one_way():
    models = [read_config(small_config(name)) for name in ALL]
    layers = [model.of_layer(i) for model in models for i in range(model.n_layers)]
    for part in (
        models,
        *([getattr(m, p) for m in layers if getattr(m, p)] for p in ("moe", "latent", "rope_scaling")),
    ):
        for field in dataclasses.fields(part[0]):
            if field.name not in SIZES | FIXED:
                assert len({str(getattr(each, field.name)) for each in part}) > 1, f"{type(part[0])}, {field.name}"
    gates = {(m.moe.gate, m.moe.normalised, m.moe.groups > 1) for m in models if m.moe}
    assert gates >= {("sigmoid", n, g) for n, g in ((True, True), (True, False), (False, True))}
    assert gates >= {
        ("share", False, True),
        ("share", False, False),
        ("softmax", False, False),
        ("sparsemixer", False, False),
    }


def last_tensor(folder: Path) -> tuple[str, tuple[int, ...], Path]:
    """The tensor that the last feed-forward of the model begins with, its shape, and its file."""
    entries = [e for e in array_sources(read_config(folder)) if e.path.endswith(("ffn.gate_up", "experts.gate_up"))]
    tensor = entries[-1].tensors[0]
    (file,) = [f for f in folder.glob("*.safetensors") if tensor.name in _names(f)]
    return tensor.name, tensor.shape, file


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="numpy") as opened:
        return list(opened.keys())


def refused(folder: Path) -> str:
    """The error of the conversion, which wrote nothing; `moejax inspect` gives the same."""
    target = folder.parent / "out" / "model"
    with pytest.raises(CheckpointError) as error:
        convert(folder, target, on_progress=quiet)
    assert not target.parent.exists()
    with pytest.raises(CheckpointError) as inspected:
        describe(str(folder))
    assert str(inspected.value) == str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", CASES)
def test_a_broken_folder_is_named_by_file_tensor_and_both_shapes(name, tmp_path):
    folder = tmp_path / "hf"
    small_folder(folder, name)
    tensor, shape, file = last_tensor(folder)
    described = config_file(folder).name
    whole, tensors = file.read_bytes(), load_file(file)
    save_file({key: array for key, array in tensors.items() if key != tensor}, file)
    said = refused(folder)
    assert f"tensor {tensor} of shape {shape} is missing" in said
    save_file(tensors | {tensor: np.zeros((*shape[:-1], shape[-1] + 1), np.float32)}, file)
    said = refused(folder)
    assert f"{file}: tensor {tensor} has shape {(*shape[:-1], shape[-1] + 1)}, but {described} says {shape}" in said
    file.write_bytes(whole[:-1])
    assert f"{file} is no whole safetensors file" in refused(folder)


@pytest.mark.parametrize("name", CASES)
def test_a_configuration_of_other_sizes_is_named_with_both(name, tmp_path):
    folder = tmp_path / "hf"
    small_folder(folder, name)
    values = CASES[name].decoder
    width = "moe_intermediate_size" if "moe_intermediate_size" in values else "intermediate_size"
    write_config(folder, small_config(name, **{width: values[width] + 8}))
    said = refused(folder)
    assert "has shape (" in said
    assert f"but {config_file(folder).name} says (" in said
    assert re.search(r"\.safetensors: tensor ([a-z_.]*(model|backbone)\.([a-z_]+\.)?)?layers\.", said)
    layer = values["num_hidden_layers"]
    more = {"num_hidden_layers": layer + 1}
    more |= {key: [*values[key], values[key][-1]] for key in BY_LAYER if key in values}
    write_config(folder, small_config(name, **more))
    assert re.search(rf"tensor [a-z_.]*layers\.{layer}\.", refused(folder))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        each if each in IN_FORMS else pytest.param(*each, marks=pytest.mark.slow)
        for each in itertools.product(CASES, ("int8", "bfloat16"))
    ],
)
def test_a_step_of_every_family_computes_with_the_numbers_its_form_stands_for(name, form, tmp_path):
    small_folder(tmp_path / "hf", name)
    cfg = dataclasses.replace(read_config(tmp_path / "hf"), weights=form)
    specs = param_specs(cfg)
    held = jax.tree.map(
        lambda spec, values: to_weight_format(cfg, spec, values),
        specs,
        load_folder(tmp_path / "hf", cfg),
        is_leaf=is_spec,
    )
    plain = jax.tree.map(
        lambda leaf: np.asarray(dequantize(leaf), np.float32), held, is_leaf=lambda leaf: isinstance(leaf, Int8)
    )
    table = np.arange(cfg.moe.experts if cfg.moe else 0)
    bucket = StepBucket(2, 1)
    asked = {0: (work(recorded(name).prompt[:20], 0, (3,)),)}
    outcomes = [
        Stepper(each, weights, 1, len(table), table).run(bucket, asked)
        for each, weights in ((cfg, held), (dataclasses.replace(cfg, weights="float32"), plain))
    ]
    rows = slice(bucket.decode, bucket.decode + 20)
    np.testing.assert_allclose(outcomes[0].hidden[rows], outcomes[1].hidden[rows], rtol=0, atol=ROUNDING[form])
    assert {name.split(".")[-1] for name in named_tensors(held)} >= ({"numbers", "scale"} if form == "int8" else set())
