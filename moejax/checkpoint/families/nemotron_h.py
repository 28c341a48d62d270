"""Nemotron-H and Nemotron 3 (NVIDIA). Published blocks are counted part by part: Mamba-2 or attention, and what follows
it, have a number each."""

from collections.abc import Mapping

from moejax.checkpoint.families.decoder import decoder_names
from moejax.checkpoint.families.family import NameMap, ServedFamily, TensorNames
from moejax.checkpoint.families.source import ConcatRows, MiddleRow, PickedRows
from moejax.config.model_config import ModelConfig

MIXER, PART = "backbone.layers.{mixer}.", "backbone.layers.{part}."


def names(cfg: ModelConfig) -> NameMap:
    """Its name map."""
    mamba = cfg.mamba
    assert mamba is not None
    N, K, H = cfg.n_heads, cfg.n_kv_heads, cfg.d_head
    mixer, part = MIXER + "mixer.", PART + "mixer."
    rows = (mamba.values + mamba.channels, mamba.heads)
    return {
        **decoder_names(cfg),
        "embed": TensorNames(("backbone.embeddings.weight",)),
        "final_norm": TensorNames(("backbone.norm_f.weight",)),
        "attention_norm": TensorNames((MIXER + "norm.weight",)),
        "ffn_norm": TensorNames((PART + "norm.weight",)),
        "qkv": TensorNames(tuple(f"{mixer}{x}_proj.weight" for x in "qkv"), ConcatRows((N * H, K * H, K * H))),
        "out": TensorNames((mixer + "o_proj.weight",)),
        "mamba.project": TensorNames((mixer + "in_proj.weight",), PickedRows(1, rows, (0,))),
        "mamba.rates": TensorNames((mixer + "in_proj.weight",), PickedRows(1, rows, (1,))),
        "mamba.kernel": TensorNames((mixer + "conv1d.weight",), MiddleRow()),
        "mamba.kernel_bias": TensorNames((mixer + "conv1d.bias",)),
        "mamba.rate_bias": TensorNames((mixer + "dt_bias",)),
        "mamba.decay": TensorNames((mixer + "A_log",)),
        "mamba.skip": TensorNames((mixer + "D",)),
        "mamba.norm": TensorNames((mixer + "norm.weight",)),
        "mamba.out": TensorNames((mixer + "out_proj.weight",)),
        "moe.router": TensorNames((part + "gate.weight",)),
        "moe.bias": TensorNames((part + "gate.e_score_correction_bias",)),
        "moe.latent_in": TensorNames((part + "fc1_latent_proj.weight",)),
        "moe.latent_out": TensorNames((part + "fc2_latent_proj.weight",)),
        **_without_gate("ffn", part),
        **_without_gate("moe.shared", part + "shared_experts."),
        **_without_gate("moe.experts", part + "experts.{expert}."),
    }


def _without_gate(leaf: str, prefix: str) -> dict[str, TensorNames]:
    return {
        f"{leaf}.gate_up": TensorNames((prefix + "up_proj.weight",)),
        f"{leaf}.down": TensorNames((prefix + "down_proj.weight",)),
    }


def blocks(cfg: ModelConfig, layer: int) -> Mapping[str, int]:
    """The numbers of a layer's blocks: Mamba-2 or attention, and its feed-forward part, if it has one."""
    mixer = 2 * layer - sum(bare < layer for bare in cfg.bare_layers)
    return {"mixer": mixer, "part": mixer + 1}


PLAIN = {"attention_bias": False, "mlp_bias": False, "use_bias": False, "mamba_proj_bias": False}
NEMOTRON_H = ServedFamily(
    names=names,
    only=PLAIN | {"mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "n_shared_experts": 1},
    unused=lambda cfg: ("mtp.*",),
    numbers=blocks,
)
