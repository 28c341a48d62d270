"""A small published model in few bits, and the same numbers in plain form."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.support.published import MIXTRAL, published_folder, write_shards

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def _pack_quantized(group: int) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "group_size": group, "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"g": {"weights": weights}},
    }


CONFIGS = {
    "int4": _pack_quantized(16),
    "int4-32": _pack_quantized(32),
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
}


def quantized_folders(folder: Path, form: str) -> Path:
    """Write a Mixtral whose projections are in this form to `folder`, and the same numbers to the folder beside it that
    is returned: in bfloat16, or, of int4 in groups of 32, which ranks can hold, experts in float32."""
    plain = folder.with_name(f"{folder.name}-plain")
    values = MIXTRAL | {"torch_dtype": "bfloat16"}
    if form == "int4-32":
        values |= {"hidden_size": 64, "intermediate_size": 96}
    tensors = published_folder(plain, values, dtype=ml_dtypes.bfloat16)
    published_folder(folder, values)
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": CONFIGS[form]}))
    stored, wide = {}, {}
    for name, array in tensors.items():
        narrow = "_proj." in name or ".experts." in name
        parts, numbers = _narrow(form, array.astype(np.float32)) if narrow else ({}, array)
        keeps = form == "int4-32" and ".experts." in name
        wide[name] = numbers if keeps else numbers.astype(ml_dtypes.bfloat16)
        stored |= {name.replace("weight", key): part for key, part in parts.items()} or {name: array}
    write_shards(folder, stored, 2)
    write_shards(plain, wide, 2)
    return plain


def _narrow(form: str, w: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    return _nvfp4(w) if form == "nvfp4" else _int4(w, 32 if form == "int4-32" else 16)


def _int4(w: np.ndarray, group: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    groups = w.reshape(len(w), -1, group)
    scale = (np.abs(groups).max(-1) / 7).astype(ml_dtypes.bfloat16)
    q = np.clip(np.rint(groups / scale.astype(np.float32)[..., None]), -8, 7).astype(np.int64)
    wide = (q * scale.astype(np.float32)[..., None]).astype(np.float32).reshape(w.shape)
    eights = (q + 8).reshape(len(w), -1, 8) << (4 * np.arange(8))
    words = eights.sum(-1).astype(np.uint32).view(np.int32)
    return {"weight_packed": words, "weight_scale": scale, "weight_shape": np.array(w.shape, np.int64)}, wide


def _nvfp4(w: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    groups = w.reshape(len(w), -1, 16)
    whole = np.array(np.abs(w).max() / (6 * 448), np.float32)
    scale = (np.abs(groups).max(-1) / 6 / whole).astype(ml_dtypes.float8_e4m3fn)
    by_group = scale.astype(np.float32)[..., None] * whole
    codes = np.abs(groups[..., None] / by_group[..., None] - FP4).argmin(-1).astype(np.uint8).reshape(len(w), -1)
    wide = (FP4[codes].reshape(groups.shape) * by_group).reshape(w.shape)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    return {"weight": packed, "weight_scale": scale, "weight_scale_2": whole}, wide
