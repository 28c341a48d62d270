"""Laws of the step: it is the model, on any number of ranks, and no bit of a row depends on anything but the row."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from moejax.config.attention_config import (
    DeltaNetConfig,
    IndexerConfig,
    KimiDeltaConfig,
    LatentConfig,
    Mamba2Config,
    ScoreGrowth,
    ShortConvolutionConfig,
    WindowedConfig,
)
from moejax.config.model_config import ModelConfig, in_slots
from moejax.config.moe_config import MoEConfig
from moejax.config.params import init_params
from serving.engine.batch import ScheduledRequest, StepBucket, layout
from tests.support.models import lively_params
from tests.support.reference import forward
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
    n_layers=4,
    d_ff=48,
    qk_norm="head",
    dense_layers=(0,),
    state_layers=(0, 1, 3),
    short_convolution=ShortConvolutionConfig(kernel=3, biased=True),
)
CONFIGS["windowed"] = shape(
    "windowed",
    {"experts_per_token": 3, "d_expert": 24, "d_shared": 24, "gate": "sigmoid", "normalised": True, "logit_cap": 1.5},
    n_layers=4,
    d_ff=48,
    d_value=12,
    value_scale=0.7,
    qk_norm="head",
    attention_gate=True,
    gate_by_head=True,
    gate_function="softplus",
    window=20,
    full_layers=(1, 3),
    windowed=WindowedConfig(n_heads=6, n_kv_heads=3, d_head=24, d_value=20, sinks=True, rope_base=500.0, rope_dims=8),
    dense_layers=(0,),
    expert_limits=(0.0, 0.0, 0.3, 0.3),
    dense_limits=(0.5, 0.0, 0.0, 0.4),
)
CONFIGS["nemotron"] = shape(
    "nemotron",
    {"experts_per_token": 3, "d_expert": 24, "d_shared": 40, "gate": "sigmoid", "normalised": True, "gate_scale": 2.5}
    | {"activation": "relu2", "d_latent": 20},
    n_layers=5,
    d_ff=48,
    tied_head=False,
    unrotated_layers=(0, 1, 2, 3, 4),
    dense_layers=(0,),
    bare_layers=(2,),
    activation="relu2",
    state_layers=(0, 2, 4),
    mamba=Mamba2Config(heads=6, d_head=12, groups=2, d_state=20),
)
CONFIGS["kimi-linear"] = shape(
    "kimi-linear",
    {"experts_per_token": 3, "d_expert": 24, "d_shared": 24, "gate": "sigmoid", "normalised": True},
    n_layers=4,
    n_kv_heads=4,
    d_head=24,
    d_ff=48,
    latent=LatentConfig(d_latent=40, d_rope=8, d_plain=16, d_value=12),
    unrotated_layers=(0, 1, 2, 3),
    dense_layers=(0,),
    state_layers=(0, 1, 3),
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
PAGES = (5, 2, 9, 11)
TABLES = {1: list(range(8)), 2: [*range(8), 0, 1], 3: [*range(8), 3], 4: [7, 6, 5, 4, 3, 2, 1, 0, 0, 3, 5, 7]}


@functools.cache
def params(name: str):
    """Random parameters, large enough that routing, attention and biases matter."""
    cfg = CONFIGS[name]
    if name in ("mixtral", "shared"):
        return jax.tree.map(lambda a: a * (1 if a.ndim < 2 else 6), init_params(cfg, jax.random.key(3)))
    return lively_params(cfg, seed=3)


def stepper(name: str, ranks: int, form: str = "float32") -> Stepper:
    table, cfg = np.array(TABLES[ranks]), dataclasses.replace(CONFIGS[name], cache_format=form)
    return Stepper(cfg, params(name), ranks, len(table) // ranks, table)


def tokens_of(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 128, count).tolist()


def prefill(model: Stepper, tokens: list[int], rank: int, bucket: StepBucket):
    """Keys and values of all tokens, and the sampled (token, log-probability)."""
    out = model.run(bucket, {rank: (work(tokens, 0, PAGES),)})
    last = bucket.decode + -(-len(tokens) // 32) - 1
    kv = model.rows(out, bucket, rank, bucket.decode, len(tokens))
    return kv, model.segment(out, bucket, rank, last)


BUCKET = StepBucket(8, 2)
"""Tests take four ranks and this bucket, so that its program is compiled once for each shape of model."""
BIT_BY_BIT = {"mixtral", "gpt-oss", "llama4", "qwen-next", "lfm2", "windowed", "nemotron", "kimi-linear"}
BIT_BY_BIT |= {"shared-sharded", "deepseek-sharded", "deepseek-sparse"}
"""One of each kind of attention, experts and placement; `scripts/soak` compares all, which compiles for minutes."""


@pytest.mark.parametrize(
    ("name", "ranks"), [*(("mixtral", n) for n in (1, 2, 3, 4)), *((x, 4) for x in CONFIGS if x != "mixtral")]
)
def test_a_step_agrees_with_the_float64_reference_on_any_number_of_ranks(name: str, ranks: int) -> None:
    tokens = tokens_of(41)
    logits = forward(params(name), CONFIGS[name], tokens)[-1]
    _, (token, logprob) = prefill(stepper(name, ranks), tokens, ranks - 1, BUCKET)
    assert token == int(np.argmax(logits))
    expected = logits[token] - np.logaddexp.reduce(logits)
    assert abs(logprob - expected) < 1e-4 * np.abs(logits).max()  # float32 over at most 7 layers


NARROW = (
    ("gpt-oss", "bfloat16"),
    ("mixtral", "int8"),
    ("deepseek-sparse", "int8"),
    ("qwen-next", "fp8"),
)
"""Caches narrower than float32, of each kind of attention: read by the kernel and by the reference, beside windows,
latents with the keys of an indexer, and states."""
SLACK = 0.25
"""The error of a row's logits, relative to the largest, in the median row. These weights are random and large, so that
a little error in a key chooses other positions, and other experts; the kernels have their own bounds."""


@pytest.mark.parametrize(("name", "form"), NARROW)
def test_a_step_over_a_narrow_cache_is_close_to_the_float64_reference(name: str, form: str) -> None:
    tokens, model, bucket = tokens_of(41), stepper(name, 4, form), BUCKET
    logits = forward(params(name), CONFIGS[name], tokens)
    out = model.run(bucket, {0: (work(tokens, 0, PAGES),)})
    error = np.abs(model.logits(out, bucket, 0, bucket.decode, 41) - logits).max(-1) / np.abs(logits).max()
    assert 0 < np.median(error) < SLACK


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *(pytest.param(x, "float32", marks=[] if x in BIT_BY_BIT else [pytest.mark.slow]) for x in CONFIGS),
        *NARROW,
    ],
)
def test_no_bit_depends_on_ranks_buckets_neighbours_or_on_what_was_cached(name: str, form: str) -> None:
    tokens, other = tokens_of(70), tokens_of(50, seed=1)
    kv, sampled = prefill(stepper(name, 1, form), tokens, 0, StepBucket(8, 4))
    for ranks in (1, 4) if name in ("mixtral", "shared", "shared-sharded") else (4,):
        model = stepper(name, ranks, form)
        rank = ranks - 1
        model.run(BUCKET, {rank: (work(tokens[:50], 0, PAGES),)})
        # Token by token from here, in buckets of changing size, beside another rank's prefill.
        for at in range(50, 70):
            bucket = (StepBucket(2, 0), BUCKET)[at % 2]
            mine = (work([tokens[at]], at, PAGES),)
            crowd = {0: (work(other, 0, (0, 1)),)} if bucket.tiles and rank else {}
            out = model.run(bucket, {rank: mine, **crowd})
            np.testing.assert_array_equal(model.rows(out, bucket, rank, 0, 1)[:, 0], kv[:, at])
        assert model.segment(out, bucket, rank, 0) == sampled


@pytest.mark.parametrize(
    "name",
    [
        name if name in BIT_BY_BIT else pytest.param(name, marks=pytest.mark.slow)
        for name, cfg in CONFIGS.items()
        if not cfg.state_layers  # a state cannot go back to the last draft that was right
    ],
)
def test_rows_of_drafts_are_those_of_the_tokens_one_by_one_whatever_the_drafts_after_them(name: str) -> None:
    tokens, bucket, other = tokens_of(40), BUCKET, {0: (work(tokens_of(1, seed=5), 0, (0,)),)}
    model, drafted = stepper(name, 4), stepper(name, 4)
    for each in (model, drafted):
        each.run(bucket, {1: (work(tokens[:30], 0, PAGES),)})
    chosen = {"temperature": 0.8, "seed": 7}
    kv, sampled = [], []
    for at in range(30, 36):  # over the end of a page
        out = model.run(bucket, {1: (work([tokens[at]], at, PAGES, **chosen),), **other})
        kv.append(model.rows(out, bucket, 1, 0, 1)[:, 0])
        sampled.append(model.segment(out, bucket, 1, 0))
    for at, wrong in ((30, False), (32, True), (33, False)):
        guesses = (tokens[at + 1], 1 if wrong else tokens[at + 2])
        item = dataclasses.replace(work([tokens[at]], at, PAGES, **chosen), drafts=guesses)
        out = drafted.run(bucket, {1: (item,)})
        for nth in range(2 if wrong else 3):
            np.testing.assert_array_equal(drafted.rows(out, bucket, 1, nth, 1)[:, 0], kv[at - 30 + nth])
            assert drafted.segment(out, bucket, 1, nth) == sampled[at - 30 + nth]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_made_twice_leaves_the_cache_as_once(name: str) -> None:
    model, tokens = stepper(name, 4), tokens_of(40)
    first = prefill(model, tokens, 1, BUCKET)
    before = jax.tree.map(np.array, model.cache)
    again = prefill(model, tokens, 1, BUCKET)
    assert first[1] == again[1]
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, model.cache))


def test_masked_experts_hand_their_tokens_to_the_next_best() -> None:
    cfg, tokens = CONFIGS["shared"], tokens_of(40)
    table = np.array([0, 1, 2, 3, 4, 5, -1, 6])
    masked = Stepper(cfg, params("shared"), 2, 4, table)
    logits = forward(params("shared"), cfg, tokens, masked={7})[-1]
    _, (token, logprob) = prefill(masked, tokens, 0, BUCKET)
    assert token == int(np.argmax(logits))
    assert abs(logprob - (logits[token] - np.logaddexp.reduce(logits))) < 1e-4 * np.abs(logits).max()


def test_every_row_counts_once_for_each_expert_it_went_to() -> None:
    model = stepper("shared", 4)
    bucket = BUCKET
    out = model.run(bucket, {2: (work(tokens_of(41), 0, PAGES),)})
    load = np.asarray(out.expert_load).reshape(4, 2, 8)
    assert load.sum((1, 2)).tolist() == [0, 0, 41 * 6 * 2, 0]


def read_rows(bucket: StepBucket, part: tuple[ScheduledRequest, ...]) -> np.ndarray:
    """Which of a rank's rows `[R]` a token is chosen or scored after."""
    read = np.zeros(bucket.rows, bool)
    for placed in layout(bucket, part):
        scored = np.flatnonzero(np.array(placed.scheduled.targets, int) >= 0)
        read[placed.row + scored] = True
        read[placed.row + len(placed.scheduled.tokens) - 1] |= placed.scheduled.samples
    return read


@pytest.mark.parametrize(("name", "ranks"), [*((x, 4) for x in CONFIGS), ("mixtral", 1)])
def test_rows_that_nobody_reads_end_at_their_keys_and_values_and_change_no_bit(name: str, ranks: int) -> None:
    bucket, generator = BUCKET, np.random.default_rng(ranks)
    targets = tuple(np.where(generator.random(40) < 0.3, generator.integers(0, 128, 40), -1).tolist())
    one = (work(tokens_of(1, seed=5), 0, (0,)), work(tokens_of(1, seed=6), 0, (1,), samples=False, targets=(7,)))
    parts = (
        (*one, work(tokens_of(40, seed=1), 0, (4, 5), samples=False, targets=targets)),
        (*one, work(tokens_of(33), 0, (2, 3))),
        (work(tokens_of(64, seed=2), 0, (6, 7), samples=False), *one),
    )
    works = dict(enumerate(parts[:ranks]))
    model = stepper(name, ranks)
    fewer, whole = model.run(bucket, works, all_read=False), model.run(bucket, works)
    read = np.concatenate([read_rows(bucket, works.get(rank, ())) for rank in range(ranks)])
    np.testing.assert_array_equal(fewer.hidden[read], whole.hidden[read])
    np.testing.assert_array_equal(fewer.hidden[~read], 0)
    jax.tree.map(np.testing.assert_array_equal, fewer.new_kv, whole.new_kv)
    for rank, items in works.items():
        for placed in layout(bucket, items):
            if placed.scheduled.samples:
                sampled = (model.segment(each, bucket, rank, placed.last) for each in (fewer, whole))
                assert next(sampled) == next(sampled)
    cfg, last = CONFIGS[name], CONFIGS[name].layer_kinds[-1]
    sent, all_sent = (each.expert_load.reshape(ranks, -1, cfg.moe.experts) for each in (fewer, whole))
    elsewhere = slice(0, -1 if in_slots(last) else None)
    np.testing.assert_array_equal(sent[:, elsewhere], all_sent[:, elsewhere])
    if in_slots(last):
        rows = read.reshape(ranks, -1).sum(1)
        np.testing.assert_array_equal(sent[:, -1].sum(1), rows * cfg.experts_of(last).experts_per_token)


@pytest.mark.parametrize("spoilt", ["embed", "qkv"])
def test_an_unread_row_with_non_finite_keys_and_values_is_tagged(spoilt: str) -> None:
    whole = params("mixtral")
    if spoilt == "embed":
        broken = whole.replace(embed=whole.embed.at[5].set(np.nan))
    else:
        (layer,) = whole.segments[0]
        broken = whole.replace(segments=((layer.replace(qkv=layer.qkv.at[-1, -1].set(np.nan)),),))
    model = dataclasses.replace(stepper("mixtral", 1), params=broken)
    chunk = work([3, 5, 4, *tokens_of(29)], 0, (0, 1), samples=False)
    out = model.run(StepBucket(2, 1), {0: (chunk,)}, all_read=False)
    told = ~np.isfinite(out.hidden).all(-1)
    assert told[3]
    assert told[2:].all() == (spoilt == "qkv")
    assert not told[:2].any()
    made = np.concatenate([out.new_kv.k, out.new_kv.v], axis=-1)
    assert not np.isfinite(made).all((0, 2))[told].any()
