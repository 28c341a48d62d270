"""The configuration of attention that only some models have: scaled rotary frequencies, growing scores, latent
attention, the indexer that chooses its positions, heads of their own in layers with a window, and the layers with a
state in the place of attention."""

import dataclasses
from typing import Literal, get_args

from moejax.config.config_values import ConfigError
from planner.inputs.latent_attention import LatentAttention
from planner.inputs.layer_states import DeltaNet, KimiDelta, Mamba2, ShortConvolution
from planner.inputs.score_growth import PublishedScoreGrowth
from planner.inputs.sparse_attention import Indexer
from planner.inputs.windowed_attention import WindowedHeads

RopeScalingKind = Literal["linear", "llama3", "yarn", "longrope", "proportional"]
ROPE_SCALINGS = get_args(RopeScalingKind)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling of rotary frequencies beyond the context that a model was first trained on (`moejax.model.rope`).

    `linear`: divided by `factor`. `llama3` (Llama 3.1): by wavelength against `original_context`, between
    `low_frequency` and `high_frequency`. `yarn` (arXiv 2309.00071): by rotations within `original_context`, between
    `beta_slow` and `beta_fast`; with `truncate` their dimensions are whole numbers. `longrope` (arXiv 2402.13753): each
    divided by its own of `factors`, or of `long_factors` where the context is longer than `original_context`.
    `proportional` (Gemma 4): as `linear`, of the first `pairs` pairs of numbers; the others are not rotated. Rotated
    vectors are multiplied by `magnitude`, with `long_factors` by `long_magnitude`.
    """

    kind: RopeScalingKind
    factor: float = 1.0
    original_context: int = 0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    magnitude: float = 1.0
    long_magnitude: float = 1.0
    pairs: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ROPE_SCALINGS:
            raise ConfigError(f"rope scaling is {self.kind!r}; known are {', '.join(map(repr, ROPE_SCALINGS))}.")
        if self.kind in ("llama3", "yarn") and self.original_context < 1:
            raise ConfigError(f"rope scaling {self.kind!r} needs original_context; it is {self.original_context}.")
        if self.factor <= 0 or any(f <= 0 for f in self.factors + self.long_factors):
            raise ConfigError(f"rope scaling factors must be positive: factor {self.factor}, factors {self.factors}.")

    def for_context(self, context: int) -> "RopeScaling":
        """The scaling of a model that is served with a context of so many tokens: one set of factors for all of them,
        because keys in the cache cannot change theirs when a sequence grows past `original_context`."""
        if not self.long_factors or context <= self.original_context:
            return self
        return dataclasses.replace(
            self, factors=self.long_factors, magnitude=self.long_magnitude, long_factors=(), long_magnitude=1.0
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowedConfig(WindowedHeads):
    """The attention of layers with a window, where it is not that of the other layers: its heads and its rotary
    embedding, whose fields mean what those of the same names in ModelConfig mean."""

    rope_base: float = 10_000.0
    rope_dims: int | None = None
    rope_scaling: RopeScaling | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreGrowth(PublishedScoreGrowth):
    """How much scores grow with the position of the query, validated."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"score_growth has every {self.every}; it must be at least 1 position.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig(LatentAttention):
    """Multi-head latent attention, and the epsilon of the norms of its latents."""

    norm_eps: float = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexerConfig(Indexer):
    """An indexer, validated; the norm of its keys has the epsilon 1e-6."""

    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for field in ("heads", "d_key", "chosen"):
            if getattr(self, field) < 1:
                raise ConfigError(f"indexer has {field} {getattr(self, field)}; it must be at least 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaNetConfig(DeltaNet):
    """A gated delta net, validated."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ConfigError(f"delta_net has {field.name} {getattr(self, field.name)}; it must be at least 1.")
        if self.kernel < 2:
            raise ConfigError(f"delta_net has kernel {self.kernel}; a convolution over time takes at least 2 inputs.")
        if self.value_heads % self.key_heads:
            raise ConfigError(
                f"{self.value_heads} value heads of a delta net cannot share {self.key_heads} key heads evenly."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortConvolutionConfig(ShortConvolution):
    """A gated short convolution, validated."""

    def __post_init__(self) -> None:
        if self.kernel < 2:
            raise ConfigError(
                f"short_convolution has kernel {self.kernel}; a convolution over time takes at least 2 inputs."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config(Mamba2):
    """A Mamba-2 layer, validated."""

    def __post_init__(self) -> None:
        for field in ("heads", "d_head", "groups", "d_state"):
            if getattr(self, field) < 1:
                raise ConfigError(f"mamba has {field} {getattr(self, field)}; it must be at least 1.")
        if self.kernel < 2:
            raise ConfigError(f"mamba has kernel {self.kernel}; a convolution over time takes at least 2 inputs.")
        if self.heads % self.groups:
            raise ConfigError(f"{self.heads} heads of mamba cannot share {self.groups} groups evenly.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KimiDeltaConfig(KimiDelta):
    """Kimi delta attention, validated."""

    def __post_init__(self) -> None:
        for field in ("heads", "d_head"):
            if getattr(self, field) < 1:
                raise ConfigError(f"kimi_delta has {field} {getattr(self, field)}; it must be at least 1.")
        if self.kernel < 2:
            raise ConfigError(f"kimi_delta has kernel {self.kernel}; a convolution over time takes at least 2 inputs.")
        if self.least_log is not None and self.least_log >= 0:
            raise ConfigError(f"kimi_delta has least_log {self.least_log}; the logarithm of a decay is below 0.")
