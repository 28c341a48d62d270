"""Ministral 3 and Mistral 4, also as the decoders of text of models that take images, and Mistral Small 3. Experts of
Mistral 4 lie together, gates above ups."""

from moejax.checkpoint.families import deepseek
from moejax.checkpoint.families.decoder import MLP, decoder_names
from moejax.checkpoint.families.family import NameMap, ServedFamily, TensorNames
from moejax.config.model_config import ModelConfig


def names(cfg: ModelConfig) -> NameMap:
    """Their name map."""
    if cfg.latent is None:
        return decoder_names(cfg)
    fused = {
        "moe.experts.gate_up": TensorNames((MLP + "experts.gate_up_proj",)),
        "moe.experts.down": TensorNames((MLP + "experts.down_proj",)),
    }
    return {**deepseek.names(cfg), **fused}


MINISTRAL3 = ServedFamily(names=names, only={"layer_types": None})
MISTRAL4 = ServedFamily(names=names, only=deepseek.PLAIN)
MISTRAL3 = ServedFamily(
    names=names,
    only=deepseek.PLAIN | {"layer_types": None},
    moved={"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    beside=("vision_tower.*", "multi_modal_projector.*"),
)
