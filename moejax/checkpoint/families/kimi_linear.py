"""Kimi-Linear (Moonshot AI) and Ling 3 (Ant Group): DeepSeek's names, other parts of a layer for its experts and its
attention, and those of Kimi delta attention."""

from moejax.checkpoint.families.decoder import ATTENTION, LAYER, MLP
from moejax.checkpoint.families.deepseek import names as deepseek_names
from moejax.checkpoint.families.family import NameMap, ServedFamily, TensorNames
from moejax.checkpoint.families.source import ConcatHalves, ConcatRows, Flattened, MiddleRow
from moejax.config.attention_config import KimiDeltaConfig
from moejax.config.model_config import ModelConfig

ROUTED, LING = LAYER + "block_sparse_moe.", LAYER + "attention."


def names(cfg: ModelConfig) -> NameMap:
    """The name map of Kimi-Linear."""
    delta = _delta(cfg)
    return {
        **deepseek_names(cfg),
        **_delta_names(delta, ATTENTION, "o_proj"),
        "kimi_delta.decay": TensorNames((ATTENTION + "A_log",), Flattened((1, 1, delta.heads, 1))),
        "kimi_delta.forget_in": TensorNames((ATTENTION + "f_a_proj.weight",)),
        "kimi_delta.forget": TensorNames((ATTENTION + "f_b_proj.weight",)),
        "kimi_delta.gate_in": TensorNames((ATTENTION + "g_a_proj.weight",)),
        "kimi_delta.gate": TensorNames((ATTENTION + "g_b_proj.weight",)),
        "moe.router": TensorNames((ROUTED + "gate.weight",)),
        "moe.bias": TensorNames((ROUTED + "gate.e_score_correction_bias",)),
        "moe.experts.gate_up": TensorNames(
            tuple(f"{ROUTED}experts.{{expert}}.{w}.weight" for w in ("w1", "w3")), ConcatHalves()
        ),
        "moe.experts.down": TensorNames((ROUTED + "experts.{expert}.w2.weight",)),
        "moe.shared.gate_up": TensorNames(
            tuple(f"{ROUTED}shared_experts.{x}_proj.weight" for x in ("gate", "up")), ConcatHalves()
        ),
        "moe.shared.down": TensorNames((ROUTED + "shared_experts.down_proj.weight",)),
    }


def ling_names(cfg: ModelConfig) -> NameMap:
    """The name map of Ling 3."""
    plain = {
        leaf: TensorNames(tuple(name.replace(ATTENTION, LING) for name in found.names), found.transform)
        for leaf, found in deepseek_names(cfg).items()
    }
    return {
        **plain,
        **_delta_names(_delta(cfg), LING, "dense"),
        "embed": TensorNames(("model.word_embeddings.weight",)),
        "out": TensorNames((LING + "dense.weight",)),
        "attention_gate": TensorNames((LING + "g_proj.weight",)),
        "kimi_delta.decay": TensorNames((LING + "A_log",)),
        "kimi_delta.forget": TensorNames((LING + "f_proj.weight",)),
        "kimi_delta.gate": TensorNames((LING + "g_proj.weight",)),
        "moe.bias": TensorNames((MLP + "gate.expert_bias",)),
    }


def _delta(cfg: ModelConfig) -> KimiDeltaConfig:
    assert cfg.kimi_delta is not None
    return cfg.kimi_delta


def _delta_names(delta: KimiDeltaConfig, part: str, out: str) -> dict[str, TensorNames]:
    sizes = (delta.keys,) * 3
    return {
        "kimi_delta.project": TensorNames(tuple(f"{part}{x}_proj.weight" for x in "qkv"), ConcatRows(sizes)),
        "kimi_delta.kernel": TensorNames(tuple(f"{part}{x}_conv1d.weight" for x in "qkv"), MiddleRow(sizes)),
        "kimi_delta.rates": TensorNames((part + "b_proj.weight",)),
        "kimi_delta.rate_bias": TensorNames((part + "dt_bias",)),
        "kimi_delta.norm": TensorNames((part + "o_norm.weight",)),
        "kimi_delta.out": TensorNames((f"{part}{out}.weight",)),
    }


def next_token_layers(cfg: ModelConfig) -> tuple[str, ...]:
    """Tensors of the layers after the last: multi-token prediction."""
    return ("*.rotary_emb.inv_freq", f"model.layers.{cfg.n_layers}.*")


PLAIN = {"attention_bias": False, "moe_layer_freq": 1}
KIMI_LINEAR = ServedFamily(
    names=names,
    only=PLAIN | {"mla_use_nope": True, "moe_router_activation_func": "sigmoid"},
    unused=next_token_layers,
)
BAILING_HYBRID = ServedFamily(names=ling_names, only=PLAIN | {"no_kda_lora": True}, unused=next_token_layers)
