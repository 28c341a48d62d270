"""Parameters of layers whose context is a state. R stands for the repeats of a segment (`moejax.config.params`)."""

from typing import Any

from flax import struct

from moejax.config.attention_config import DeltaNetConfig, KimiDeltaConfig, Mamba2Config, ShortConvolutionConfig
from moejax.config.model_config import ModelConfig
from moejax.config.param_spec import BIAS_STD, ParamSpec


@struct.dataclass
class DeltaNetWeights:
    """A gated delta net (`moejax.model.delta_net`).

    `project [R, channels + values, D]` makes queries, keys and values, then the gate of the output; `rates
    [R, 2 * value_heads, D]` how much of a value is written, then how fast the state decays, with `rate_bias` and
    `decay [R, value_heads]`. `convolution [R, channels, kernel]` has the oldest input first. `norm [R, d_value]` is
    that of the outputs, `out [R, D, values]` their projection.
    """

    project: Any
    rates: Any
    convolution: Any
    rate_bias: Any
    decay: Any
    norm: Any
    out: Any


@struct.dataclass
class ConvolutionWeights:
    """A gated short convolution (`moejax.model.short_convolution`): `project [R, 3 * D, D]` makes the gate of its
    inputs, that of its outputs, and the values; `kernel [R, D, kernel]` has the oldest input first; `out [R, D, D]`.
    Biases `[R, 3 * D]`, `[R, D]`, `[R, D]`, or None."""

    project: Any
    kernel: Any
    out: Any
    project_bias: Any = None
    kernel_bias: Any = None
    out_bias: Any = None


@struct.dataclass
class MambaWeights:
    """A Mamba-2 layer (`moejax.model.mamba`).

    `project [R, values + channels, D]` makes the gate of the output, then values, and what is written and read with;
    `rates [R, heads, D]` step sizes, with `rate_bias` and `decay [R, heads]`. `kernel [R, channels, kernel]` has the
    oldest input first, `kernel_bias [R, channels]` or None. `skip [R, heads]` weighs values in the output; `norm [R,
    values]` is that of the outputs, group by group, `out [R, D, values]` their projection.
    """

    project: Any
    rates: Any
    kernel: Any
    rate_bias: Any
    decay: Any
    skip: Any
    norm: Any
    out: Any
    kernel_bias: Any = None


@struct.dataclass
class KimiDeltaWeights:
    """Kimi delta attention (`moejax.model.kimi_delta`), where C is the numbers of all heads.

    `project [R, 3 * C, D]` makes queries, keys and values; `rates [R, heads, D]` how much of a value is written.
    `forget [R, C, D]` makes how fast each key of the state decays, with `rate_bias [R, C]` and `decay [R, heads]`, and
    `gate [R, C, D]` the gate of the output; if they go through few numbers, those are D in their shapes and
    `forget_in`, `gate_in` `[R, low, D]` make them. `kernel [R, 3 * C, kernel]` has the oldest input first. `norm [R,
    d_head]` is that of the outputs, `out [R, D, C]` their projection.
    """

    project: Any
    rates: Any
    kernel: Any
    forget: Any
    rate_bias: Any
    decay: Any
    gate: Any
    norm: Any
    out: Any
    forget_in: Any = None
    gate_in: Any = None


def state_specs(cfg: ModelConfig, R: int, out_std: float) -> Any:
    """The ParamSpecs of a state layer of `cfg`, without its norm. `out_std` is that of its output projection."""
    if cfg.short_convolution is not None:
        return _convolution(cfg, cfg.short_convolution, R, out_std)
    if cfg.mamba is not None:
        return _mamba(cfg, cfg.mamba, R, out_std)
    if cfg.kimi_delta is not None:
        return _kimi_delta(cfg, cfg.kimi_delta, R, out_std)
    assert cfg.delta_net is not None
    return _delta_net(cfg, cfg.delta_net, R, out_std)


def _mamba(cfg: ModelConfig, mamba: Mamba2Config, R: int, out_std: float) -> MambaWeights:
    D = cfg.d_model
    each = ParamSpec((R, mamba.heads), ("layer", "heads"), 0)
    bias = ParamSpec((R, mamba.channels), ("layer", "heads"), BIAS_STD) if mamba.biased else None
    return MambaWeights(
        project=ParamSpec((R, mamba.values + mamba.channels, D), ("layer", "heads", "model"), 0.02),
        rates=ParamSpec((R, mamba.heads, D), ("layer", "rate", "model"), 0.02),
        kernel=ParamSpec((R, mamba.channels, mamba.kernel), ("layer", "rate", "kernel"), 0.3),
        rate_bias=each,
        decay=each,
        skip=each,
        norm=ParamSpec((R, mamba.values), ("layer", "heads"), 0),
        out=ParamSpec((R, D, mamba.values), ("layer", "model", "heads"), out_std),
        kernel_bias=bias,
    )


def _kimi_delta(cfg: ModelConfig, delta: KimiDeltaConfig, R: int, out_std: float) -> KimiDeltaWeights:
    D, C, low = cfg.d_model, delta.keys, delta.d_low
    return KimiDeltaWeights(
        project=ParamSpec((R, 3 * C, D), ("layer", "heads", "model"), 0.02),
        rates=ParamSpec((R, delta.heads, D), ("layer", "rate", "model"), 0.02),
        kernel=ParamSpec((R, 3 * C, delta.kernel), ("layer", "rate", "kernel"), 0.3),
        forget=ParamSpec((R, C, low or D), ("layer", "rate", "latent" if low else "model"), 0.02),
        rate_bias=ParamSpec((R, C), ("layer", "heads"), 0),
        decay=ParamSpec((R, delta.heads), ("layer", "heads"), 0),
        gate=ParamSpec((R, C, low or D), ("layer", "heads", "latent" if low else "model"), 0.02),
        norm=ParamSpec((R, delta.d_head), ("layer", "head"), 0),
        out=ParamSpec((R, D, C), ("layer", "model", "heads"), out_std),
        forget_in=ParamSpec((R, low, D), ("layer", "rate", "model"), 0.02) if low else None,
        gate_in=ParamSpec((R, low, D), ("layer", "latent", "model"), 0.02) if low else None,
    )


def _convolution(cfg: ModelConfig, convolution: ShortConvolutionConfig, R: int, out_std: float) -> ConvolutionWeights:
    D = cfg.d_model
    project, kernel, out = (
        ParamSpec((R, width), ("layer", "model"), BIAS_STD) if convolution.biased else None for width in (3 * D, D, D)
    )
    return ConvolutionWeights(
        project=ParamSpec((R, 3 * D, D), ("layer", "heads", "model"), 0.02),
        kernel=ParamSpec((R, D, convolution.kernel), ("layer", "rate", "kernel"), 0.3),
        out=ParamSpec((R, D, D), ("layer", "model", "heads"), out_std),
        project_bias=project,
        kernel_bias=kernel,
        out_bias=out,
    )


def _delta_net(cfg: ModelConfig, delta: DeltaNetConfig, R: int, out_std: float) -> DeltaNetWeights:
    D = cfg.d_model
    each = ParamSpec((R, delta.value_heads), ("layer", "heads"), 0)
    return DeltaNetWeights(
        project=ParamSpec((R, delta.channels + delta.values, D), ("layer", "heads", "model"), 0.02),
        rates=ParamSpec((R, 2 * delta.value_heads, D), ("layer", "rate", "model"), 0.02),
        convolution=ParamSpec((R, delta.channels, delta.kernel), ("layer", "rate", "kernel"), 0.3),
        rate_bias=each,
        decay=each,
        norm=ParamSpec((R, delta.d_value), ("layer", "head"), 0),
        out=ParamSpec((R, D, delta.values), ("layer", "model", "heads"), out_std),
    )
