"""Small models with every branch of the decoder, and steps of them on ranks inside this process."""

import dataclasses
import functools
from typing import Any

import numpy as np

from moejax.config.attention_config import (
    DeltaNetConfig,
    IndexerConfig,
    KimiDeltaConfig,
    LatentConfig,
    Mamba2Config,
    RopeScaling,
    ScoreGrowth,
    ShortConvolutionConfig,
    WindowedConfig,
)
from moejax.config.model_config import ModelConfig
from moejax.config.moe_config import MoEConfig
from moejax.config.params import Params
from serving.engine.batch import StepBucket
from tests.support.models import lively_params, random_params
from tests.support.stepping import Stepper, work

SMALL = ModelConfig(
    name="mixtral-shape",
    vocab_size=128,
    d_model=64,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    d_head=16,
    d_ff=96,
    moe=MoEConfig(experts=8, experts_per_token=2, d_expert=96),
)
"""Mixtral's shape; the others are described by what they have otherwise."""


def shape(name: str, moe: dict[str, Any], **changes: Any) -> ModelConfig:
    """A model of eight experts that differs from SMALL in these fields."""
    experts = MoEConfig(**{"experts": 8, "experts_per_token": 2} | moe)
    return dataclasses.replace(SMALL, name=f"{name}-shape", moe=experts, **changes)


CONFIGS = {
    "mixtral": SMALL,
    "shared": shape(
        "smollm2-moe",
        {"experts_per_token": 6, "d_expert": 32, "d_shared": 64, "gate": "one"},
        d_model=96,
        n_layers=7,
        n_heads=3,
        n_kv_heads=1,
        d_head=32,
        d_ff=160,
        moe_every=3,
    ),
    "deepseek": shape(
        "deepseek",
        {"experts_per_token": 3, "d_expert": 24, "d_shared": 24, "gate": "sigmoid", "normalised": True}
        | {"gate_scale": 2.5, "groups": 4, "groups_used": 2},
        n_kv_heads=4,
        d_head=24,
        tied_head=False,
        latent=LatentConfig(d_latent=40, d_rope=8, d_plain=16, d_value=12, d_query=32),
        dense_layers=(0,),
    ),
    "gpt-oss": shape(
        "gpt-oss",
        {"d_expert": 48, "expert_bias": True, "swiglu_limit": 1.5},
        d_head=24,
        d_ff=48,
        tied_head=False,
        qkv_bias=True,
        out_bias=True,
        sinks=True,
        window=20,
        full_layers=(1,),
    ),
    "phi": shape(
        "phi",
        {"d_expert": 48, "gate": "sparsemixer", "jitter": 0.3},
        n_layers=2,
        d_ff=48,
        norm="layer",
        tied_head=False,
        head_bias=True,
        qk_norm="head",
        rope_dims=8,
        embed_scale=3.0,
        residual_scale=0.5,
        attention_scale=0.2,
        logit_scale=0.25,
    ),
    "qwen": shape(
        "qwen",
        {"experts_per_token": 3, "d_expert": 24, "d_shared": 40, "shared_gate": True, "gate": "share"},
        n_layers=2,
        d_ff=48,
        qk_norm="all",
        clip_qkv=1.0,
    ),
}
CONFIGS |= {
    "trinity": shape(
        "trinity",
        {"experts_per_token": 3, "d_expert": 24, "d_shared": 24, "gate": "biased_share", "normalised": True},
        n_layers=4,
        d_ff=48,
        qk_norm="head",
        norm_after_rope=True,
        window=20,
        full_layers=(1, 3),
        unrotated_layers=(1, 3),
        attention_gate=True,
        post_norms=True,
        dense_layers=(0,),
    ),
    "llama4": shape(
        "llama4",
        {"experts_per_token": 1, "d_expert": 24, "d_shared": 24, "gate": "input_sigmoid"},
        n_layers=4,
        d_ff=48,
        qk_norm="l2",
        window=20,
        chunked=True,
        full_layers=(3,),
        unrotated_layers=(1, 3),
        score_growth=ScoreGrowth(scale=0.5, every=7),
        moe_every=2,
    ),
}
CONFIGS["qwen-next"] = shape(
    "qwen-next",
    {"experts_per_token": 3, "d_expert": 24, "d_shared": 40, "shared_gate": True},
    n_layers=4,
    d_ff=48,
    qk_norm="head",
    rope_dims=8,
    attention_gate=True,
    state_layers=(0, 2),
    delta_net=DeltaNetConfig(key_heads=2, value_heads=6, d_key=12, d_value=20, kernel=4),
)
CONFIGS["lfm2"] = shape(
    "lfm2",
    {"experts_per_token": 3, "d_expert": 24, "gate": "sigmoid", "normalised": True, "sum_epsilon": 1e-3},
    n_layers=3,
    d_ff=48,
    qk_norm="head",
    dense_layers=(0,),
    state_layers=(0, 1),
    short_convolution=ShortConvolutionConfig(kernel=3, biased=True),
)
CONFIGS["windowed"] = shape(
    "windowed",
    {"experts_per_token": 3, "d_expert": 24, "d_shared": 24, "gate": "sigmoid", "normalised": True, "logit_cap": 1.5},
    n_layers=3,
    d_ff=48,
    d_value=12,
    value_scale=0.7,
    qk_norm="head",
    attention_gate=True,
    gate_by_head=True,
    gate_function="softplus",
    window=20,
    full_layers=(1,),
    windowed=WindowedConfig(n_heads=6, n_kv_heads=3, d_head=24, d_value=20, sinks=True, rope_base=500.0, rope_dims=8),
    dense_layers=(0,),
    expert_limits=(0.0, 0.0, 0.3),
    dense_limits=(0.5, 0.0, 0.4),
)
CONFIGS["gemma4"] = shape(
    "gemma4",
    {"experts_per_token": 3, "d_expert": 24, "d_shared": 40, "activation": "geglu"}
    | {"own_norms": True, "expert_scales": True},
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    d_head=40,
    d_ff=40,
    value_norm=True,
    keys_as_values=True,
    qk_norm="head",
    post_norms=True,
    layer_scales=True,
    logit_cap=5.0,
    embed_scale=8.0,
    attention_scale=1.0,
    window=20,
    full_layers=(2,),
    windowed=WindowedConfig(n_heads=4, n_kv_heads=2, d_head=24, rope_base=500.0),
    rope_scaling=RopeScaling(kind="proportional", factor=2.0, pairs=5),
    activation="geglu",
)
CONFIGS["nemotron"] = shape(
    "nemotron",
    {"experts_per_token": 3, "d_expert": 24, "d_shared": 40, "gate": "sigmoid", "normalised": True, "gate_scale": 2.5}
    | {"activation": "relu2", "d_latent": 20},
    n_layers=4,
    d_ff=48,
    tied_head=False,
    unrotated_layers=(0, 1, 2, 3),
    dense_layers=(0,),
    bare_layers=(2,),
    activation="relu2",
    state_layers=(0, 2, 3),
    mamba=Mamba2Config(heads=6, d_head=12, groups=2, d_state=20),
)
CONFIGS["kimi-linear"] = shape(
    "kimi-linear",
    {"experts_per_token": 3, "d_expert": 24, "d_shared": 24, "gate": "sigmoid", "normalised": True},
    n_layers=3,
    n_kv_heads=4,
    d_head=24,
    d_ff=48,
    latent=LatentConfig(d_latent=40, d_rope=8, d_plain=16, d_value=12),
    unrotated_layers=(0, 1, 2),
    dense_layers=(0,),
    state_layers=(0, 1),
    kimi_delta=KimiDeltaConfig(heads=3, d_head=12, d_low=8),
)
CONFIGS["ling"] = dataclasses.replace(
    CONFIGS["kimi-linear"],
    name="ling-shape",
    unrotated_layers=(),
    attention_gate=True,
    gate_by_head=True,
    kimi_delta=KimiDeltaConfig(heads=4, d_head=20, kernel=3, least_log=-5.0),
)
CONFIGS["deepseek-sparse"] = shape(
    "deepseek-sparse",
    {"experts_per_token": 3, "d_expert": 24, "d_shared": 24, "gate": "biased_share", "normalised": True}
    | {"groups": 4, "groups_used": 2},
    n_layers=2,
    n_kv_heads=4,
    d_head=24,
    d_ff=48,
    tied_head=False,
    latent=LatentConfig(d_latent=40, d_rope=8, d_plain=16, d_value=12, d_query=32),
    indexer=IndexerConfig(heads=3, d_key=12, chosen=20),
    score_growth=ScoreGrowth(scale=0.5, every=16, first=0, all_layers=True),
)
CONFIGS |= {f"{name}-sharded": dataclasses.replace(CONFIGS[name], shard_dense=True) for name in ("shared", "deepseek")}
STATES = tuple(name for name, cfg in CONFIGS.items() if cfg.state_layers)
LATENTS = tuple(name for name, cfg in CONFIGS.items() if cfg.latent is not None and name not in STATES)
WINDOWS = tuple(name for name, cfg in CONFIGS.items() if cfg.window is not None)
PLAIN = tuple(name for name in CONFIGS if name not in (*STATES, *LATENTS, *WINDOWS))
"""The models by what their layers see of the positions before."""
PAGES = (5, 2, 9, 11)
TABLES = {1: list(range(8)), 2: [*range(8), 0, 1], 3: [*range(8), 3], 4: [7, 6, 5, 4, 3, 2, 1, 0, 0, 3, 5, 7]}


@functools.cache
def params(name: str) -> Params:
    """Random parameters, large enough that routing, attention and biases matter."""
    return random_params(CONFIGS[name], 3) if name in ("mixtral", "shared") else lively_params(CONFIGS[name], seed=3)


def stepper(name: str, ranks: int, form: str = "float32") -> Stepper:
    """A model on `ranks` devices, with its cache in this format."""
    table, cfg = np.array(TABLES[ranks]), dataclasses.replace(CONFIGS[name], cache_format=form)
    return Stepper(cfg, params(name), ranks, len(table) // ranks, table)


def tokens_of(count: int, seed: int = 0) -> list[int]:
    """Random tokens."""
    return np.random.default_rng(seed).integers(0, 128, count).tolist()


def prefill(model: Stepper, tokens: list[int], rank: int, bucket: StepBucket) -> tuple[np.ndarray, tuple[int, float]]:
    """Keys and values of all tokens, and the sampled (token, log-probability)."""
    out = model.run(bucket, {rank: (work(tokens, 0, PAGES),)})
    last = bucket.decode + -(-len(tokens) // 32) - 1
    kv = model.rows(out, bucket, rank, bucket.decode, len(tokens))
    return kv, model.segment(out, bucket, rank, last)


BUCKET = StepBucket(8, 2)
"""Tests take four ranks and this bucket, so that its program is compiled once for each shape of model."""
