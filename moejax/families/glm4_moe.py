"""GLM-4.5 (arXiv 2508.06471): DeepSeek-V3's routing over plain grouped-query attention, half of each head rotated."""

from typing import Any

from moejax.config import ModelConfig
from moejax.families.decoder import decoder_names, read_decoder
from moejax.families.deepseek import next_token_layers, shared_expert_names, sigmoid_moe
from moejax.families.family import Family, NameMap
from moejax.families.fields import Fields


def read(f: Fields) -> dict[str, Any]:
    """Fields of ModelConfig."""
    return read_decoder(f, norm_eps=1e-5, partial=0.5) | {
        "qkv_bias": f.flag("attention_bias", False),
        "qk_norm": "head" if f.flag("use_qk_norm", False) else "none",
        "moe": sigmoid_moe(f, groups=1, used=1, scale=1.0),
        "dense_layers": tuple(range(f.integer("first_k_dense_replace", 1, least=0))),
    }


def names(cfg: ModelConfig) -> NameMap:
    """Its name map."""
    return decoder_names(cfg) | shared_expert_names(cfg)


GLM4_MOE = Family(
    model_type="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    read=read,
    names=names,
    unused=next_token_layers,
)
