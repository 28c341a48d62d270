"""LFM2-MoE (Liquid, 2025). The name of the convolution's weights has `conv` twice: once for the part of the layer."""

from moejax.checkpoint.families.decoder import ATTENTION, LAYER, decoder_names
from moejax.checkpoint.families.family import NameMap, ServedFamily, TensorNames
from moejax.checkpoint.families.source import ConcatHalves, MiddleRow
from moejax.config.model_config import ModelConfig

PART, CONVOLUTION = LAYER + "feed_forward.", LAYER + "conv."


def names(cfg: ModelConfig) -> NameMap:
    """Its name map."""
    bias = (PART + "expert_bias",) if cfg.moe is not None and cfg.moe.router_bias else ()
    return {
        **decoder_names(cfg),
        "final_norm": TensorNames(("model.embedding_norm.weight",)),
        "attention_norm": TensorNames((LAYER + "operator_norm.weight",)),
        "ffn_norm": TensorNames((LAYER + "ffn_norm.weight",)),
        "query_norm": TensorNames((ATTENTION + "q_layernorm.weight",)),
        "key_norm": TensorNames((ATTENTION + "k_layernorm.weight",)),
        "out": TensorNames((ATTENTION + "out_proj.weight",)),
        "convolution.project": TensorNames((CONVOLUTION + "in_proj.weight",)),
        "convolution.project_bias": TensorNames((CONVOLUTION + "in_proj.bias",)),
        "convolution.kernel": TensorNames((CONVOLUTION + "conv.weight",), MiddleRow()),
        "convolution.kernel_bias": TensorNames((CONVOLUTION + "conv.bias",)),
        "convolution.out": TensorNames((CONVOLUTION + "out_proj.weight",)),
        "convolution.out_bias": TensorNames((CONVOLUTION + "out_proj.bias",)),
        "moe.router": TensorNames((PART + "gate.weight",)),
        "moe.bias": TensorNames(bias),
        **_swiglu("ffn", PART),
        **_swiglu("moe.experts", PART + "experts.{expert}."),
    }


def _swiglu(leaf: str, prefix: str) -> dict[str, TensorNames]:
    return {
        f"{leaf}.gate_up": TensorNames((prefix + "w1.weight", prefix + "w3.weight"), ConcatHalves()),
        f"{leaf}.down": TensorNames((prefix + "w2.weight",)),
    }


LFM2_MOE = ServedFamily(names=names)
