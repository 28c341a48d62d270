"""Llama 4 (Meta, 2025). Rotated numbers of its heads lie in pairs; ours lie in halves. Experts lie together, `[E, in,
out]`, gate before up."""

from moejax.checkpoint.families.decoder import LAYER, decoder_names, expert_names, swiglu_names
from moejax.checkpoint.families.family import NameMap, ServedFamily, TensorNames
from moejax.checkpoint.families.latent import PairedHeads
from moejax.checkpoint.families.source import Transposed
from moejax.config.model_config import ModelConfig

PART = LAYER + "feed_forward."


def names(cfg: ModelConfig) -> NameMap:
    """Its name map."""
    plain, heads = decoder_names(cfg), PairedHeads(cfg.n_heads, cfg.n_kv_heads, cfg.d_head)
    own = {
        "qkv": TensorNames(plain["qkv"].names, heads),
        "qkv_bias": TensorNames(plain["qkv_bias"].names, heads),
        "moe.experts.gate_up": TensorNames((PART + "experts.gate_up_proj",), Transposed()),
        "moe.experts.down": TensorNames((PART + "experts.down_proj",), Transposed()),
    }
    routed = expert_names(PART + "router.weight", PART + "experts.", shared=PART + "shared_expert.")
    return plain | routed | swiglu_names("ffn", PART) | own


LLAMA4_TEXT = ServedFamily(names=names)
LLAMA4 = ServedFamily(
    names=names,
    moved={"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    beside=("vision_model.*", "multi_modal_projector.*"),
)
