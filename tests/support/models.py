"""Small random models, and folders of them, for the tests of checkpoints and stores."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from moejax.checkpoint.checkpoint import save_model
from moejax.config.attention_config import DeltaNetConfig
from moejax.config.model_config import ModelConfig
from moejax.config.moe_config import MoEConfig
from moejax.config.params import BIAS_STD, Params, ParamSpec, is_spec, param_specs

MIXTRAL = ModelConfig(
    name="mixtral-shape",
    vocab_size=96,
    d_model=32,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    d_head=8,
    d_ff=48,
    tied_head=False,
    max_context=64,
    stop_tokens=(0,),
    moe=MoEConfig(experts=4, experts_per_token=2, d_expert=24),
)
SHARED = ModelConfig(
    name="shared-shape",
    vocab_size=96,
    d_model=32,
    n_layers=7,
    n_heads=3,
    n_kv_heads=1,
    d_head=8,
    d_ff=64,
    moe=MoEConfig(experts=8, experts_per_token=6, d_expert=4, d_shared=32, gate="one"),
    moe_every=3,
)
DENSE = ModelConfig(
    name="dense-shape", vocab_size=96, d_model=32, n_layers=2, n_heads=4, n_kv_heads=4, d_head=8, d_ff=48
)
HYBRID = ModelConfig(
    name="hybrid-shape",
    vocab_size=96,
    d_model=32,
    n_layers=6,
    n_heads=4,
    n_kv_heads=2,
    d_head=8,
    d_ff=48,
    qk_norm="head",
    rope_dims=4,
    attention_gate=True,
    moe=MoEConfig(experts=4, experts_per_token=2, d_expert=24, d_shared=16, shared_gate=True),
    state_layers=(0, 1, 3, 4),
    delta_net=DeltaNetConfig(key_heads=2, value_heads=4, d_key=12, d_value=20, kernel=4),
)
"""Two layers with a state for each with attention."""
ALL = (MIXTRAL, SHARED, DENSE)
SHARDED = dataclasses.replace(SHARED, name="sharded", shard_dense=True)
LEADING_DENSE = dataclasses.replace(MIXTRAL, name="leading-dense", n_layers=4, dense_layers=(0,))


def random_params(cfg: ModelConfig, seed: int = 0, dtype: type = np.float32) -> Params:
    """Parameters large enough that routing and attention matter."""
    generator = np.random.default_rng(seed)

    def leaf(spec: ParamSpec) -> np.ndarray:
        values = spec.std * generator.standard_normal(spec.shape) if spec.std else np.ones(spec.shape)
        return (values * (1 if values.ndim < 2 else 6)).astype(dtype)

    return jax.tree.map(leaf, param_specs(cfg), is_leaf=is_spec)


def lively_params(cfg: ModelConfig, seed: int = 0) -> Params:
    """Parameters of which norms and biases matter too."""
    generator = np.random.default_rng(seed)

    def leaf(spec: ParamSpec) -> np.ndarray:
        noise = generator.standard_normal(spec.shape).astype(np.float32)
        return 1 + 0.2 * noise if spec.std == 0 else (0.2 if spec.std == BIAS_STD else 6 * spec.std) * noise

    return jax.tree.map(leaf, param_specs(cfg), is_leaf=is_spec)


def model_folder(folder: Path, cfg: ModelConfig, dtype: type = np.float32, *, seed: int = 0) -> Params:
    """Write a model folder of random parameters, which are returned."""
    params = random_params(cfg, seed, dtype=dtype)
    save_model(folder, cfg, params, tokenizer_json="{}", chat_template="{{ messages }}")
    return params
