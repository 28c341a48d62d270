"""DeepSeek-V2 (arXiv 2405.04434), DeepSeek-V3 and R1 (arXiv 2412.19437), Kimi-K2, which is V3 in other sizes,
Kimi-K2.5, whose decoder stands beside a vision tower, GLM-4.7-Flash, and DeepSeek-V3.2 and GLM-5 with their indexer.

Their rotated dimensions lie in pairs; ours lie in halves. Queries and keys are both reordered, so that scores are the
same. The layer for multi-token prediction that V3's checkpoints carry is read for a server that drafts with it; its own
embedding and head are copies of the model's.
"""

import dataclasses

from moejax.checkpoint.families.decoder import ATTENTION, MLP, decoder_names, expert_names
from moejax.checkpoint.families.family import NameMap, ServedFamily, TensorNames
from moejax.checkpoint.families.latent import KeyUp, PairsToHalves, ValueUp
from moejax.config.model_config import ModelConfig

PLAIN = {"attention_bias": False, "mlp_bias": False, "moe_layer_freq": 1, "rope_interleave": True}


def names(cfg: ModelConfig) -> NameMap:
    """Their name map."""
    return decoder_names(cfg) | _latent_names(cfg) | shared_expert_names(cfg) | mtp_names(cfg)


def shared_expert_names(cfg: ModelConfig) -> dict[str, TensorNames]:
    """Names of a routed layer: V2's and V3's, also GLM-4's and dots1's."""
    routed = expert_names(MLP + "gate.weight", MLP + "experts.", shared=MLP + "shared_experts.")
    if cfg.moe is not None and cfg.moe.gate == "sigmoid":
        routed["moe.bias"] = TensorNames((MLP + "gate.e_score_correction_bias",))
    return routed


def _latent_names(cfg: ModelConfig) -> dict[str, TensorNames]:
    latent = cfg.latent
    assert latent is not None
    sizes = (cfg.n_heads, latent.d_plain, latent.d_value)
    key_value = (ATTENTION + "kv_b_proj.weight",)
    return {
        "latent.query": TensorNames(
            (ATTENTION + ("q_b_proj.weight" if latent.d_query else "q_proj.weight"),),
            PairsToHalves(cfg.n_heads, latent.d_rope),
        ),
        "latent.query_down": TensorNames((ATTENTION + "q_a_proj.weight",)),
        "latent.query_norm": TensorNames((ATTENTION + "q_a_layernorm.weight",)),
        "latent.down": TensorNames((ATTENTION + "kv_a_proj_with_mqa.weight",), PairsToHalves(1, latent.d_rope)),
        "latent.norm": TensorNames((ATTENTION + "kv_a_layernorm.weight",)),
        "latent.key_up": TensorNames(key_value, KeyUp(*sizes)),
        "latent.value_up": TensorNames(key_value, ValueUp(*sizes)),
    }


def indexed_names(cfg: ModelConfig) -> NameMap:
    """The name map of DeepSeek-V3.2: the rotated numbers of its indexer lie in halves."""
    part = ATTENTION + "indexer."
    return {
        **names(cfg),
        "indexer.query": TensorNames((part + "wq_b.weight",)),
        "indexer.key": TensorNames((part + "wk.weight",)),
        "indexer.norm": TensorNames((part + "k_norm.weight",)),
        "indexer.norm_bias": TensorNames((part + "k_norm.bias",)),
        "indexer.weigh": TensorNames((part + "weights_proj.weight",)),
    }


def paired_index_names(cfg: ModelConfig) -> NameMap:
    """The name map of GLM-5: the rotated numbers of its indexer lie in pairs."""
    plain = dict(indexed_names(cfg))
    assert cfg.indexer is not None
    assert cfg.latent is not None
    for leaf, heads in (("query", cfg.indexer.heads), ("key", 1), ("norm", 1), ("norm_bias", 1)):
        name = f"indexer.{leaf}"
        plain[name] = TensorNames(plain[name].names, PairsToHalves(heads, cfg.latent.d_rope, leading=True))
    return plain


def mtp_names(cfg: ModelConfig) -> dict[str, TensorNames]:
    """Names of multi-token prediction besides those of its decoder layer, which is the one after the last:
    DeepSeek-V3's and GLM-4's."""
    part = f"model.layers.{cfg.n_layers}."
    return {
        "mtp.token_norm": TensorNames((part + "enorm.weight",)),
        "mtp.hidden_norm": TensorNames((part + "hnorm.weight",)),
        "mtp.project": TensorNames((part + "eh_proj.weight",)),
        "mtp.norm": TensorNames((part + "shared_head.norm.weight",)),
    }


def next_token_layers(cfg: ModelConfig) -> tuple[str, ...]:
    """Tensors of the layers after the last: multi-token prediction."""
    return ("*.rotary_emb.inv_freq", f"model.layers.{cfg.n_layers}.*")


DEEPSEEK_V2 = ServedFamily(names=names, only=PLAIN | {"scoring_func": "softmax", "norm_topk_prob": False})
DEEPSEEK_V3 = KIMI_K2 = ServedFamily(
    names=names, only=PLAIN | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}, unused=next_token_layers
)
GLM4_MOE_LITE = ServedFamily(names=names, only=DEEPSEEK_V3.only, unused=next_token_layers)
DEEPSEEK_V32 = dataclasses.replace(DEEPSEEK_V3, names=indexed_names)
GLM_MOE_DSA = dataclasses.replace(DEEPSEEK_V3, names=paired_index_names)
KIMI_K25 = dataclasses.replace(
    DEEPSEEK_V3,
    moved={"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    beside=("vision_tower.*", "mm_projector.*"),
)
