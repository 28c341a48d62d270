"""Laws of the distillation of split layers, and of the files that it goes on from."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from moejax.config.config_values import ConfigError
from moejax.config.moe_config import MoEConfig
from moejax.config.params import MoE
from moejax.model.experts import apply_shared_expert
from moejax.model.feed_forward import PartRows
from moejax.model.layers import swiglu
from moejax.model.reference import mixture
from moejax.tools.distil import (
    CHUNK,
    Distillation,
    correct_outputs,
    distil_layer,
    distil_model,
    left_out_sets,
    output_products,
    train_router,
)
from moejax.tools.layer_inputs import feed_forward_inputs, parts_of, read_layer_inputs, write_layer_inputs
from moejax.tools.moefy import Split, split_layer, split_model
from moejax.tools.smollm2 import distillation_texts
from planner.inputs.shipped import shipped
from tests.support.models import DENSE, random_params

HOW = Distillation(steps=150, batch=128, rate=1e-2, router_ridge=0.01, ridge=0.03)
WIDE = dataclasses.replace(DENSE, name="wide", n_layers=4)
SPLIT = Split(every=2, experts=4, experts_per_token=2, shared=16, ridge=0.3)
CFG = SPLIT.config(WIDE, "split")
MOE: MoEConfig = CFG.moe  # pyright: ignore[reportAssignmentType]


def inputs(tokens: int, seed: int) -> np.ndarray:
    """Inputs of a layer in four clusters, so that there is something for a router to find."""
    rng = np.random.default_rng(seed)
    centres = 2 * np.random.default_rng(7).standard_normal((4, WIDE.d_model))
    return (centres[rng.integers(0, 4, tokens)] + rng.standard_normal((tokens, WIDE.d_model))).astype(np.float32)


@pytest.fixture(scope="module")
def layer():
    """A dense layer with weights large enough to be far from linear, and the same layer split."""
    ffn = jax.tree.map(lambda leaf: 8 * np.asarray(leaf[0]), random_params(WIDE).segments[0][0].ffn)
    return ffn, split_layer(ffn, MOE, inputs(400, 0), SPLIT.ridge)


def error(layer: MoE, moe: MoEConfig, dense, x: np.ndarray) -> float:
    wanted = swiglu(x, dense.gate_up, dense.down)
    routed, _ = mixture(layer, moe, PartRows(x, x, x), np.ones(moe.experts, bool))
    made = routed + apply_shared_expert(x, layer, moe)
    return float(np.square(np.asarray(made - wanted)).mean() / np.square(np.asarray(wanted)).mean())


def test_a_distilled_layer_is_nearer_to_the_dense_one_on_inputs_it_was_not_distilled_on(layer):
    dense, split = layer
    x, unseen = inputs(3000, 1), inputs(1000, 2)
    weight = np.ones(len(x), np.float32)
    products = output_products(split.experts, x)
    router, bias = train_router(x, weight, products, left_out_sets(MOE), HOW)
    routed = split.replace(router=router, bias=bias)
    distilled = distil_layer(split, MOE, x, weight, HOW)
    errors = [error(each, MOE, dense, unseen) for each in (split, routed, distilled)]
    assert errors[0] > errors[1] > 1.2 * errors[2]
    np.testing.assert_array_equal(distilled.router, router)


def test_a_layer_that_leaves_nothing_out_is_not_changed(layer):
    dense, split = layer
    every = dataclasses.replace(MOE, experts_per_token=MOE.experts)
    x = inputs(64, 3)
    assert distil_layer(split, every, x, np.ones(64), HOW) is split
    corrected = correct_outputs(split, every, x, np.ones(64, np.float32), HOW.ridge)
    jax.tree.map(np.testing.assert_array_equal, corrected, split)
    assert error(split, every, dense, x) < 1e-9


def test_the_pieces_in_which_a_text_is_computed_change_nothing_but_rounding(layer, monkeypatch):
    _, split = layer
    x, weight = inputs(CHUNK + 100, 4), np.linspace(0.5, 2, CHUNK + 100, dtype=np.float32)
    whole = correct_outputs(split, MOE, x, weight, HOW.ridge)
    monkeypatch.setattr("moejax.tools.distil.CHUNK", 300)
    parts = correct_outputs(split, MOE, x, weight, HOW.ridge)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), whole, parts)


def test_too_many_sets_of_experts_are_refused():
    assert left_out_sets(MOE).sum(1).tolist() == [2] * 6
    with pytest.raises(ConfigError, match="8 of 16 experts can be chosen in 12870 ways; a router is distilled for at"):
        left_out_sets(dataclasses.replace(MOE, experts=16, experts_per_token=8))


class Interrupted(Exception):
    """Ends a run in the middle."""


def test_a_run_that_is_interrupted_anywhere_ends_with_the_same_weights(tmp_path):
    params = random_params(WIDE)
    tokens = np.random.default_rng(0).integers(0, WIDE.vocab_size, (20, 24)).astype(np.int32)
    real = np.arange(24) < np.random.default_rng(1).integers(8, 25, (20, 1))
    calibration = np.asarray(feed_forward_inputs(params, WIDE, tokens)[0])[:, real]
    split = split_model(params, CFG, calibration, SPLIT.ridge, lambda: None)
    layers = [i for i, kind in enumerate(CFG.layer_kinds) if kind == "moe"]
    steps = parts_of(tokens) + len(layers)

    def run(draft, stop: int | None = None):
        done = 0

        def count() -> None:
            nonlocal done
            done += 1
            if done == stop:
                raise Interrupted

        write_layer_inputs(draft, params, WIDE, layers, tokens, real, count)
        weigh = lambda layer: (read_layer_inputs(draft, layer)[0], 1 / read_layer_inputs(draft, layer)[1])  # noqa: E731
        return distil_model(split, CFG, weigh, HOW, draft, count)

    whole = run(tmp_path / "whole")
    inputs_TD, residuals_T = read_layer_inputs(tmp_path / "whole", 1)
    assert inputs_TD.shape == (real.sum(), WIDE.d_model)
    assert residuals_T.shape == (real.sum(),)
    np.testing.assert_allclose(inputs_TD, calibration[layers[1]], rtol=1e-3, atol=1e-6)
    for stop in range(1, steps + 1):
        with pytest.raises(Interrupted):
            run(tmp_path / "draft", stop)
        files = {file: file.stat().st_mtime_ns for file in (tmp_path / "draft").iterdir()}
        jax.tree.map(np.testing.assert_array_equal, run(tmp_path / "draft"), whole)
        assert all(file.stat().st_mtime_ns == made for file, made in files.items())
        shutil.rmtree(tmp_path / "draft")


def test_no_text_that_quality_is_measured_on_was_distilled_on():
    lines = {line for text in distillation_texts() for line in text.splitlines() if len(line) > 40}
    assert len(lines) > 1000
    for name in ("shakespeare", "wordnet", "python"):
        held_out = shipped(f"models/tiny/held_out/{name}.txt").read_text("utf-8").splitlines()
        assert not lines & {line for line in held_out if len(line) > 40}
