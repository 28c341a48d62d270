"""gpt-oss (arXiv 2508.10925): attention sinks, a window on every other layer, biases, a clamped SwiGLU.

Experts lie together, `[E, in, out]`, gate and up rows alternating. (MXFP4 checkpoints have `_blocks` and `_scales` in
their place, `[E, out, in]` once dequantised: the transpose of the shapes here.)
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from moejax.config import ModelConfig, MoEConfig
from moejax.families.decoder import MLP, decoder_names, read_decoder, read_experts, read_windows
from moejax.families.family import Family, NameMap, Names
from moejax.families.fields import Fields

EXPERTS = MLP + "experts."
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""What is meant when config.json says nothing."""


@dataclasses.dataclass(frozen=True)
class Turned:
    """`[in, out]` to `[out, in]`; with `alternate`, outputs 0, 2, 4 ... come first, then 1, 3, 5 ..."""

    alternate: bool = False

    def shapes(self, target: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """See Transform."""
        return (target[::-1],)

    def __call__(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """See Transform."""
        turned = parts[0].T
        return np.concatenate([turned[::2], turned[1::2]]) if self.alternate else turned


def read(f: Fields) -> dict[str, Any]:
    """Fields of ModelConfig."""
    if not f.has("rope_parameters") and not f.has("rope_scaling"):
        f = dataclasses.replace(f, values={**f.values, "rope_scaling": YARN})
    plain = read_decoder(f, rope_base=150_000.0, norm_eps=1e-5, d_head=f.integer("head_dim", 64))
    moe = MoEConfig(
        **read_experts(f),
        d_expert=plain["d_ff"],
        expert_bias=True,
        swiglu_limit=f.number("swiglu_limit", 7.0),
        swiglu_alpha=f.number("swiglu_alpha", 1.702),
    )
    biased = f.flag("attention_bias", True)
    windows = read_windows(f, f.integer("sliding_window", 128), tuple(i % 2 == 0 for i in range(plain["n_layers"])))
    return plain | {"moe": moe, "sinks": True, "qkv_bias": biased, "out_bias": biased} | windows


def names(cfg: ModelConfig) -> NameMap:
    """Its name map."""
    return decoder_names(cfg) | {
        "moe.router": Names((MLP + "router.weight",)),
        "moe.bias": Names((MLP + "router.bias",)),
        "moe.experts.gate_up": Names((EXPERTS + "gate_up_proj",), Turned(alternate=True)),
        "moe.experts.gate_up_bias": Names((EXPERTS + "gate_up_proj_bias",), Turned(alternate=True)),
        "moe.experts.down": Names((EXPERTS + "down_proj",), Turned()),
        "moe.experts.down_bias": Names((EXPERTS + "down_proj_bias",)),
    }


GPT_OSS = Family(model_type="gpt_oss", architectures=("GptOssForCausalLM",), read=read, names=names)
