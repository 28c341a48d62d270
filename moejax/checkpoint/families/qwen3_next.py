"""Qwen3-Next (Qwen, 2025), and the decoder of Qwen3.5. Scales of norms are published less 1, except those of delta
nets; queries and the gate of attention lie together, head by head."""

from moejax.checkpoint.families.decoder import ATTENTION, LAYER, MLP, decoder_names, expert_names
from moejax.checkpoint.families.family import NameMap, ServedFamily, TensorNames
from moejax.checkpoint.families.source import ConcatRows, MiddleRow, PickedRows, PlusOne
from moejax.config.model_config import ModelConfig

DELTA = LAYER + "linear_attn."


def names(cfg: ModelConfig) -> NameMap:
    """The name map of Qwen3-Next: the projections of a delta net are published by key head."""
    delta = cfg.delta_net
    assert delta is not None
    G, share = delta.key_heads, delta.value_heads // delta.key_heads
    sizes = (delta.d_key, delta.d_key, share * delta.d_value, share * delta.d_value)
    routed = expert_names(MLP + "gate.weight", MLP + "experts.", shared=MLP + "shared_expert.")
    return {
        **_common_names(cfg),
        **routed,
        "moe.shared_gate": TensorNames((MLP + "shared_expert_gate.weight",)),
        "delta.project": TensorNames((DELTA + "in_proj_qkvz.weight",), PickedRows(G, sizes, (0, 1, 2, 3))),
        "delta.rates": TensorNames((DELTA + "in_proj_ba.weight",), PickedRows(G, (share, share), (0, 1))),
    }


def fused_names(cfg: ModelConfig) -> NameMap:
    """The name map of Qwen3.5: experts lie together, and the projections of a delta net are tensors of their own."""
    delta = cfg.delta_net
    assert delta is not None
    V = delta.value_heads
    return {
        **names(cfg),
        "moe.experts.gate_up": TensorNames((MLP + "experts.gate_up_proj",)),
        "moe.experts.down": TensorNames((MLP + "experts.down_proj",)),
        "delta.project": TensorNames(
            (DELTA + "in_proj_qkv.weight", DELTA + "in_proj_z.weight"), ConcatRows((delta.channels, delta.values))
        ),
        "delta.rates": TensorNames((DELTA + "in_proj_b.weight", DELTA + "in_proj_a.weight"), ConcatRows((V, V))),
    }


def _common_names(cfg: ModelConfig) -> dict[str, TensorNames]:
    N, K, H = cfg.n_heads, cfg.n_kv_heads, cfg.d_head
    plain = decoder_names(cfg)
    norms = ("final_norm", "attention_norm", "ffn_norm", "query_norm", "key_norm")
    queries = PickedRows(N, (H, H), (0,), below=(K * H, K * H))
    return {
        **plain,
        **{name: TensorNames(plain[name].names, PlusOne()) for name in norms},
        "qkv": TensorNames(plain["qkv"].names, queries),
        "attention_gate": TensorNames((ATTENTION + "q_proj.weight",), PickedRows(N, (H, H), (1,))),
        "delta.convolution": TensorNames((DELTA + "conv1d.weight",), MiddleRow()),
        "delta.rate_bias": TensorNames((DELTA + "dt_bias",)),
        "delta.decay": TensorNames((DELTA + "A_log",)),
        "delta.norm": TensorNames((DELTA + "norm.weight",)),
        "delta.out": TensorNames((DELTA + "out_proj.weight",)),
    }


def unused(cfg: ModelConfig) -> tuple[str, ...]:
    """The layers for multi-token prediction."""
    return ("*.rotary_emb.inv_freq", "mtp.*")


QWEN3_NEXT = ServedFamily(names=names, only={"attention_bias": False}, unused=unused)
QWEN3_5_MOE = ServedFamily(
    names=fused_names,
    only={"attention_bias": False},
    unused=unused,
    moved={"model.": "model.language_model."},
    beside=("model.visual.*",),
)
QWEN3_5 = QWEN3_5_MOE
