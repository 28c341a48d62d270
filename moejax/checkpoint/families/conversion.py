"""From a published model, as `planner.inputs.published` reads it, to the ModelConfig that serves it."""

from moejax.config.attention_config import (
    ROPE_SCALINGS,
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
from moejax.config.config_values import ConfigError
from moejax.config.model_config import ModelConfig
from moejax.config.moe_config import MoEConfig
from planner.inputs.published import PublishedModel, PublishedRope
from planner.inputs.published.model import PublishedWindowed

ROPE_KINDS = ("default", *ROPE_SCALINGS)


def serving_config(model: PublishedModel, *, name: str, max_context: int | None = None) -> ModelConfig:
    """The ModelConfig of a model of a served family, with the published context or a shorter one.

    Raises ConfigError for a longer context, for experts without a routed layer, and for what is not served.
    """
    context = model.context if max_context is None else max_context
    if context > model.context:
        raise ConfigError(f"max_position_embeddings is {model.context}; a context of {context} cannot be served.")
    if model.experts is not None and not model.routed_layers:
        raise ConfigError(
            f"the model has {model.experts.experts} experts, but none of its {model.layers} layers is routed "
            f"(first_k_dense_replace, mlp_only_layers or decoder_sparse_step, which is {model.sparse_step}, exclude "
            "them all). Correct these fields, or publish the model as a dense one."
        )
    full = tuple(i for i, window in enumerate(model.windows) if window is None)
    return ModelConfig(
        name=name,
        family=model.family,
        vocab_size=model.vocabulary,
        d_model=model.hidden_size,
        n_layers=model.layers,
        n_heads=model.heads,
        n_kv_heads=model.kv_heads,
        d_head=model.head_size,
        d_ff=model.dense_width,
        d_value=model.value_size,
        value_scale=model.value_scale,
        value_norm=model.value_norm,
        keys_as_values=model.keys_as_values,
        windowed=None if model.windowed is None else _windowed(model.windowed),
        norm=model.norm,
        norm_eps=model.norm_eps,
        tied_head=model.tied_head,
        head_bias=model.head_bias,
        qkv_bias=model.qkv_bias,
        out_bias=model.out_bias,
        qk_norm=model.qk_norm,
        norm_after_rope=model.norm_after_rope,
        unrotated_layers=model.unrotated_layers,
        score_growth=None if model.score_growth is None else ScoreGrowth(**vars(model.score_growth)),
        attention_gate=model.attention_gate,
        gate_by_head=model.gate_by_head,
        gate_function=model.gate_function,
        post_norms=model.post_norms,
        chunked=model.chunked and model.window is not None,
        clip_qkv=model.clip_qkv,
        sinks=model.sinks,
        window=model.window,
        full_layers=full if model.window is not None else (),
        attention_scale=model.score_scale,
        embed_scale=model.embed_scale,
        residual_scale=model.residual_scale,
        logit_scale=model.logit_scale,
        logit_cap=model.logit_cap,
        layer_scales=model.layer_scales,
        max_context=context,
        stop_tokens=model.stop_tokens,
        latent=None if model.latent is None else LatentConfig(**vars(model.latent)),
        indexer=None if model.indexer is None else IndexerConfig(**vars(model.indexer)),
        delta_net=None if model.delta_net is None else DeltaNetConfig(**vars(model.delta_net)),
        short_convolution=(
            None if model.short_convolution is None else ShortConvolutionConfig(**vars(model.short_convolution))
        ),
        mamba=None if model.mamba is None else Mamba2Config(**vars(model.mamba)),
        kimi_delta=None if model.kimi_delta is None else KimiDeltaConfig(**vars(model.kimi_delta)),
        state_layers=model.state_layers,
        moe=None if model.experts is None else MoEConfig(**vars(model.experts)),
        moe_every=model.sparse_step,
        expert_limits=model.expert_limits,
        dense_limits=model.dense_limits,
        dense_layers=model.dense_layers,
        bare_layers=model.bare_layers,
        activation=model.activation,
        rope_base=model.rope.theta,
        rope_dims=None if model.latent is not None or model.rope.size == model.head_size else model.rope.size,
        rope_scaling=_rope_scaling(model.rope),
    )


def _windowed(windowed: PublishedWindowed) -> WindowedConfig:
    rope, heads = windowed.rope, {key: value for key, value in vars(windowed).items() if key != "rope"}
    dims = None if rope.size == windowed.d_head else rope.size
    return WindowedConfig(**heads, rope_base=rope.theta, rope_dims=dims, rope_scaling=_rope_scaling(rope))


def _rope_scaling(rope: PublishedRope) -> RopeScaling | None:
    if rope.kind not in ROPE_KINDS:
        known = f"{', '.join(map(repr, ROPE_KINDS[:-1]))} and {ROPE_KINDS[-1]!r}"
        raise ConfigError(f"rope_type is {rope.kind!r}; known are {known}.")
    if rope.kind == "default":
        return None
    if rope.kind == "linear":
        return RopeScaling(kind="linear", factor=rope.factor)
    if rope.kind == "proportional":
        return RopeScaling(kind="proportional", factor=rope.factor, pairs=rope.pairs)
    if rope.kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=rope.factor,
            original_context=rope.original_context,
            low_frequency=rope.low_frequency,
            high_frequency=rope.high_frequency,
        )
    if rope.kind == "yarn":
        return RopeScaling(
            kind="yarn",
            factor=rope.factor,
            original_context=rope.original_context,
            beta_fast=rope.beta_fast,
            beta_slow=rope.beta_slow,
            truncate=rope.truncate,
            magnitude=rope.magnitude,
        )
    return RopeScaling(
        kind="longrope",
        original_context=rope.original_context,
        factors=rope.short_factors,
        long_factors=rope.long_factors,
        magnitude=rope.magnitude,
        long_magnitude=rope.long_magnitude,
    )
