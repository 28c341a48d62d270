"""Dense decoders: Llama (arXiv 2407.21783), Mistral (arXiv 2310.06825), Qwen2 (arXiv 2407.10671) and Qwen3."""

from __future__ import annotations

from typing import Any

from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.decoder import read_decoder, read_head_size, read_windows


def read_llama(f: ConfigFields) -> dict[str, Any]:
    """Llama: a key/value head for each query head unless the configuration says otherwise."""
    biased = f.flag("attention_bias", False)
    parts = {"qkv_bias": biased, "out_bias": biased, "mlp_bias": f.flag("mlp_bias", False)}
    return read_decoder(f, context=2048, stop=(2,)) | parts


def read_mistral(f: ConfigFields) -> dict[str, Any]:
    """Mistral: a window of 4096 positions on all layers unless it is null."""
    plain = read_decoder(f, kv_heads=8, context=131_072, stop=(2,))
    window = f.integer("sliding_window", 4096, null=None)
    return plain | {"windows": (window,) * plain["layers"]}


def read_qwen2(f: ConfigFields) -> dict[str, Any]:
    """Qwen2: biases on queries, keys and values."""
    return read_decoder(f, kv_heads=32, context=32_768) | {"qkv_bias": True, "windows": _late_windows(f)}


def read_qwen3(f: ConfigFields) -> dict[str, Any]:
    """Qwen3: queries and keys normed by head."""
    biased = f.flag("attention_bias", False)
    plain = read_decoder(f, kv_heads=32, context=32_768, head_size=read_head_size(f, 128))
    return plain | {"qk_norm": "head", "qkv_bias": biased, "out_bias": biased, "windows": _late_windows(f)}


def _late_windows(f: ConfigFields) -> tuple[int | None, ...]:
    """Windows on the layers from `max_window_layers` on, if `use_sliding_window`."""
    layers = f.integer("num_hidden_layers")
    if not f.flag("use_sliding_window", False):
        return (None,) * layers
    first = f.integer("max_window_layers", 28, least=0)
    return read_windows(f, f.integer("sliding_window", 4096, null=None), tuple(i >= first for i in range(layers)))
