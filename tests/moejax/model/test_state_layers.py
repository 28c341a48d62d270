"""Law of every layer with a state: it is its formula, and no bit depends on how rows are cut into steps."""

import dataclasses

import jax
import numpy as np
import pytest

from moejax.config.attention_config import (
    DeltaNetConfig,
    KimiDeltaConfig,
    Mamba2Config,
    ShortConvolutionConfig,
)
from moejax.config.layer_states import LayerStates, state_shapes
from moejax.config.model_config import STATE_MIXERS, ModelConfig
from moejax.config.params import Layer
from moejax.config.step_inputs import StepInputs
from moejax.model.state_layers import mix_states
from tests.support import reference
from tests.support.models import HYBRID, lively_params
from tests.support.state_steps import BUCKET, LAYER, PLACES, in_chunks

ROWS = 70
PLAIN = dataclasses.replace(HYBRID, delta_net=None, state_layers=(), n_layers=4, moe=None)
MIXERS = {
    "short convolution": {"short_convolution": ShortConvolutionConfig(kernel=2)},
    "biased convolution": {"short_convolution": ShortConvolutionConfig(kernel=4, biased=True)},
    "delta net": {"delta_net": DeltaNetConfig(key_heads=2, value_heads=6, d_key=12, d_value=20)},
    "Mamba-2": {"mamba": Mamba2Config(heads=6, d_head=12, groups=2, d_state=20)},
    "Mamba-2, plain": {"mamba": Mamba2Config(heads=3, d_head=20, groups=3, d_state=8, kernel=2, biased=False)},
    "Kimi": {"kimi_delta": KimiDeltaConfig(heads=3, d_head=20, d_low=8)},
    "Ling": {"kimi_delta": KimiDeltaConfig(heads=4, d_head=12, kernel=3, least_log=-5.0)},
}


def model(name: str) -> tuple[ModelConfig, Layer]:
    """A model whose first three layers have this mixer, and the first of them."""
    cfg = dataclasses.replace(PLAIN, state_layers=(0, 1, 2), **MIXERS[name])
    return cfg, jax.tree.map(lambda leaf: leaf[:1], lively_params(cfg, seed=3).segments[0][0])


@pytest.mark.parametrize("name", MIXERS)
def test_rows_have_the_same_bits_however_they_are_cut_into_steps(name: str) -> None:
    cfg, layer = model(name)
    own = jax.tree.map(lambda leaf: leaf[0], layer)

    @jax.jit
    def run(rows: np.ndarray, states: LayerStates, inputs: StepInputs) -> tuple[jax.Array, LayerStates]:
        return mix_states(rows, own, states, LAYER, inputs, BUCKET, cfg)

    rows = np.random.default_rng(0).standard_normal((ROWS, cfg.d_model)).astype(np.float32)
    shapes = state_shapes(cfg, PLACES)
    assert shapes is not None
    outputs, state = in_chunks(run, rows, shapes, [ROWS])
    expected = reference.mix_states(rows.astype(np.float64), layer, 0, cfg)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    for sizes in ([1] * ROWS, [2, 1, 32, 33, 1, 1], [40, 2, 2, 26]):
        again, state_again = in_chunks(run, rows, shapes, sizes)
        np.testing.assert_array_equal(again, outputs)
        jax.tree.map(np.testing.assert_array_equal, state_again, state)


def test_every_kind_is_compared() -> None:
    assert {kind for mixer in MIXERS.values() for kind in mixer} == set(STATE_MIXERS)
