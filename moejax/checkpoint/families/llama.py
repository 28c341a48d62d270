"""Dense decoders: Llama, Mistral, Qwen2 and Qwen3."""

from moejax.checkpoint.families.decoder import decoder_names
from moejax.checkpoint.families.family import ServedFamily

LLAMA = ServedFamily(names=decoder_names, only={"mlp_bias": False})
MISTRAL = ServedFamily(names=decoder_names, only={"layer_types": None})
QWEN2 = QWEN3 = ServedFamily(names=decoder_names)
