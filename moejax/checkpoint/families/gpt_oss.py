"""gpt-oss (arXiv 2508.10925).

Experts lie together, `[E, in, out]`, gate and up rows alternating. (MXFP4 checkpoints have `_blocks` and `_scales` in
their place, `[E, out, in]` once dequantised: the transpose of the shapes here.)
"""

from moejax.checkpoint.families.decoder import MLP, decoder_names
from moejax.checkpoint.families.family import NameMap, ServedFamily, TensorNames
from moejax.checkpoint.families.source import Transposed
from moejax.config.model_config import ModelConfig

EXPERTS = MLP + "experts."


def names(cfg: ModelConfig) -> NameMap:
    """Its name map."""
    return decoder_names(cfg) | {
        "moe.router": TensorNames((MLP + "router.weight",)),
        "moe.bias": TensorNames((MLP + "router.bias",)),
        "moe.experts.gate_up": TensorNames((EXPERTS + "gate_up_proj",), Transposed(alternate=True)),
        "moe.experts.gate_up_bias": TensorNames((EXPERTS + "gate_up_proj_bias",), Transposed(alternate=True)),
        "moe.experts.down": TensorNames((EXPERTS + "down_proj",), Transposed()),
        "moe.experts.down_bias": TensorNames((EXPERTS + "down_proj_bias",)),
    }


GPT_OSS = ServedFamily(names=names)
