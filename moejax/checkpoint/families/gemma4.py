"""Gemma 4 (Google, 2026): the decoder of text, by itself or beside the towers of images and sound. All experts of a
layer lie in one tensor, `[E, out, in]`, gate above up; layers that see everything may publish no values."""

from moejax.checkpoint.families.decoder import ATTENTION, LAYER, MLP, decoder_names, swiglu_names
from moejax.checkpoint.families.family import NameMap, ServedFamily, TensorNames
from moejax.checkpoint.families.source import ConcatRows
from moejax.config.model_config import ModelConfig

ROUTER, EXPERTS, BEFORE, AFTER = (
    LAYER + part for part in ("router.", "experts.", "pre_feedforward_layernorm", "post_feedforward_layernorm")
)


def names(cfg: ModelConfig) -> NameMap:
    """Its name map. Of a layer with experts the first pair of norms is that of the dense part."""
    own = {
        "attention_post_norm": TensorNames((LAYER + "post_attention_layernorm.weight",)),
        "ffn_norm": TensorNames((f"{BEFORE}{'' if cfg.moe is None else '_2'}.weight",)),
        "ffn_post_norm": TensorNames((AFTER + ".weight",)),
        "scale": TensorNames((LAYER + "layer_scalar",)),
        "moe.router": TensorNames((ROUTER + "proj.weight",)),
        "moe.router_norm": TensorNames((ROUTER + "scale",)),
        "moe.expert_scale": TensorNames((ROUTER + "per_expert_scale",)),
        "moe.bias": TensorNames(()),
        "moe.shared_norm": TensorNames((BEFORE + ".weight",)),
        "moe.shared_post_norm": TensorNames((AFTER + "_1.weight",)),
        "moe.post_norm": TensorNames((AFTER + "_2.weight",)),
        "moe.experts.gate_up": TensorNames((EXPERTS + "gate_up_proj",)),
        "moe.experts.down": TensorNames((EXPERTS + "down_proj",)),
        **swiglu_names("moe.shared", MLP),
    }
    if cfg.keys_as_values:
        rows = ConcatRows((cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head))
        own["qkv"] = TensorNames(tuple(f"{ATTENTION}{x}_proj.weight" for x in "qk"), rows)
    return decoder_names(cfg) | own


ONLY = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}
GEMMA4_TEXT = ServedFamily(names=names, only=ONLY)
GEMMA4 = ServedFamily(
    names=names,
    only=ONLY,
    moved={"model.": "model.language_model."},
    beside=("model.vision_tower.*", "model.embed_vision.*", "model.audio_tower.*", "model.embed_audio.*"),
)
