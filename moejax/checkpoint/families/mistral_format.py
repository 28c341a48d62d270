"""Models in Mistral's own format. The rotated numbers of queries and keys lie in pairs; experts of models with a shared
expert lie beside the feed-forward part, those of Mixtral within it."""

from moejax.checkpoint.families.family import NameMap, ServedFamily, TensorNames
from moejax.checkpoint.families.latent import KeyUp, PairedHeads, PairsToHalves, ValueUp
from moejax.checkpoint.families.source import ConcatHalves
from moejax.config.model_config import ModelConfig

LAYER = "layers.{layer}."
ATTENTION, FEED_FORWARD = LAYER + "attention.", LAYER + "feed_forward."


def names(cfg: ModelConfig) -> NameMap:
    """Their name map."""
    within = LAYER if cfg.latent is not None else FEED_FORWARD
    return {
        "embed": TensorNames(("tok_embeddings.weight",)),
        "final_norm": TensorNames(("norm.weight",)),
        "head": TensorNames(("output.weight",)),
        "attention_norm": TensorNames((LAYER + "attention_norm.weight",)),
        "ffn_norm": TensorNames((LAYER + "ffn_norm.weight",)),
        "out": TensorNames((ATTENTION + "wo.weight",)),
        **(_latent_names(cfg) if cfg.latent is not None else _head_names(cfg)),
        **_swiglu_names("ffn", FEED_FORWARD),
        "moe.router": TensorNames((within + "gate.weight",)),
        "moe.bias": TensorNames(()),
        **_swiglu_names("moe.experts", within + "experts.{expert}."),
        **_swiglu_names("moe.shared", LAYER + "shared_experts."),
    }


def _head_names(cfg: ModelConfig) -> dict[str, TensorNames]:
    heads = PairedHeads(cfg.n_heads, cfg.n_kv_heads, cfg.d_head)
    return {"qkv": TensorNames(tuple(f"{ATTENTION}w{x}.weight" for x in "qkv"), heads)}


def _latent_names(cfg: ModelConfig) -> dict[str, TensorNames]:
    latent = cfg.latent
    assert latent is not None
    sizes = (cfg.n_heads, latent.d_plain, latent.d_value)
    key_value = (ATTENTION + "wkv_b.weight",)
    return {
        "latent.query": TensorNames((ATTENTION + "wq_b.weight",), PairsToHalves(cfg.n_heads, latent.d_rope)),
        "latent.query_down": TensorNames((ATTENTION + "wq_a.weight",)),
        "latent.query_norm": TensorNames((ATTENTION + "q_a_norm.weight",)),
        "latent.down": TensorNames((ATTENTION + "wkv_a_with_mqa.weight",), PairsToHalves(1, latent.d_rope)),
        "latent.norm": TensorNames((ATTENTION + "kv_a_norm.weight",)),
        "latent.key_up": TensorNames(key_value, KeyUp(*sizes)),
        "latent.value_up": TensorNames(key_value, ValueUp(*sizes)),
    }


def _swiglu_names(leaf: str, prefix: str) -> dict[str, TensorNames]:
    return {
        f"{leaf}.gate_up": TensorNames((prefix + "w1.weight", prefix + "w3.weight"), ConcatHalves()),
        f"{leaf}.down": TensorNames((prefix + "w2.weight",)),
    }


MISTRAL_FORMAT = ServedFamily(
    names=names,
    beside=("vision_encoder.*", "vision_language_adapter.*", "patch_merger.*", "pre_mm_projector_norm.*"),
)
