"""Tensor names that nearly all families share with Llama."""

from moejax.checkpoint.families.family import TensorNames
from moejax.checkpoint.families.source import ConcatHalves, ConcatRows
from moejax.config.model_config import ModelConfig

LAYER = "model.layers.{layer}."
ATTENTION, MLP = LAYER + "self_attn.", LAYER + "mlp."


def decoder_names(cfg: ModelConfig) -> dict[str, TensorNames]:
    """Names outside the routed experts. Names of leaves that `cfg` does not have are not used."""
    N, K, H = cfg.n_heads, cfg.n_kv_heads, cfg.d_head
    heads = ConcatRows((N * H, K * H, K * cfg.value_size))
    return {
        "embed": TensorNames(("model.embed_tokens.weight",)),
        "final_norm": TensorNames(("model.norm.weight",)),
        "final_norm_bias": TensorNames(("model.norm.bias",)),
        "head": TensorNames(("lm_head.weight",)),
        "head_bias": TensorNames(("lm_head.bias",)),
        "attention_norm": TensorNames((LAYER + "input_layernorm.weight",)),
        "attention_norm_bias": TensorNames((LAYER + "input_layernorm.bias",)),
        "ffn_norm": TensorNames((LAYER + "post_attention_layernorm.weight",)),
        "ffn_norm_bias": TensorNames((LAYER + "post_attention_layernorm.bias",)),
        "qkv": TensorNames(tuple(f"{ATTENTION}{x}_proj.weight" for x in "qkv"), heads),
        "qkv_bias": TensorNames(tuple(f"{ATTENTION}{x}_proj.bias" for x in "qkv"), heads),
        "query_norm": TensorNames((ATTENTION + "q_norm.weight",)),
        "key_norm": TensorNames((ATTENTION + "k_norm.weight",)),
        "sinks": TensorNames((ATTENTION + "sinks",)),
        "out": TensorNames((ATTENTION + "o_proj.weight",)),
        "out_bias": TensorNames((ATTENTION + "o_proj.bias",)),
        **swiglu_names("ffn", MLP),
    }


def expert_names(router: str, experts: str, *, shared: str = "") -> dict[str, TensorNames]:
    """Names of a routed layer: the router, and the experts and shared expert as separate projections."""
    return {
        "moe.router": TensorNames((router,)),
        "moe.bias": TensorNames(()),
        **swiglu_names("moe.experts", experts + "{expert}."),
        **(swiglu_names("moe.shared", shared) if shared else {}),
    }


def swiglu_names(leaf: str, prefix: str) -> dict[str, TensorNames]:
    """Names of a feed-forward whose three projections are tensors of their own."""
    return {
        f"{leaf}.gate_up": TensorNames((prefix + "gate_proj.weight", prefix + "up_proj.weight"), ConcatHalves()),
        f"{leaf}.down": TensorNames((prefix + "down_proj.weight",)),
    }
