"""Dense decoders: Llama, Mistral, Qwen2 and Qwen3."""

from typing import Any

from moejax.families.decoder import decoder_names, read_d_head, read_decoder, read_windows
from moejax.families.family import Family
from moejax.families.fields import Fields


def read_llama(f: Fields) -> dict[str, Any]:
    """Llama (arXiv 2407.21783)."""
    f.only(mlp_bias=False)
    biased = f.flag("attention_bias", False)
    return read_decoder(f) | {"qkv_bias": biased, "out_bias": biased}


def read_mistral(f: Fields) -> dict[str, Any]:
    """Mistral (arXiv 2310.06825). A window is used unless it is null."""
    f.only(layer_types=None)
    window = f.integer("sliding_window", None) if "sliding_window" in f.values else 4096
    return read_decoder(f) | {"window": window}


def read_qwen2(f: Fields) -> dict[str, Any]:
    """Qwen2 (arXiv 2407.10671): biases on queries, keys and values."""
    return read_decoder(f) | {"qkv_bias": True} | _late_windows(f)


def read_qwen3(f: Fields) -> dict[str, Any]:
    """Qwen3 (arXiv 2505.09388): queries and keys normed by head."""
    biased = f.flag("attention_bias", False)
    plain = read_decoder(f, d_head=read_d_head(f) if f.has("head_dim") else 128)
    return plain | {"qk_norm": "head", "qkv_bias": biased, "out_bias": biased} | _late_windows(f)


def _late_windows(f: Fields) -> dict[str, Any]:
    if not f.flag("use_sliding_window", False):
        return {}
    layers, first = f.integer("num_hidden_layers"), f.integer("max_window_layers", 28, least=0)
    return read_windows(f, f.integer("sliding_window", 4096), tuple(i >= first for i in range(layers)))


LLAMA = Family(model_type="llama", architectures=("LlamaForCausalLM",), read=read_llama, names=decoder_names)
MISTRAL = Family(model_type="mistral", architectures=("MistralForCausalLM",), read=read_mistral, names=decoder_names)
QWEN2 = Family(model_type="qwen2", architectures=("Qwen2ForCausalLM",), read=read_qwen2, names=decoder_names)
QWEN3 = Family(model_type="qwen3", architectures=("Qwen3ForCausalLM",), read=read_qwen3, names=decoder_names)
