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
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    "mxfp4": {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "config_groups": {"g": {"weights": {"num_bits": 4, "type": "float", "group_size": 32}}},
    },
    "int4": _pack_quantized(16),
    "int4-32": _pack_quantized(32),
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
}


def quantized_folders(folder: Path, form: str, *, exactly: bool = False) -> Path:
    """Write a Mixtral whose projections are in this form to `folder`, and the same numbers to the folder beside it that
    is returned: projections in bfloat16, as they are widened, or in float32."""
    plain = folder.with_name(f"{folder.name}-plain")
    values = MIXTRAL | {"torch_dtype": "bfloat16"}
    if form not in ("int4", "nvfp4"):
        values |= {"hidden_size": 64, "intermediate_size": 96}
    tensors = published_folder(plain, values, dtype=ml_dtypes.bfloat16)
    published_folder(folder, values)
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": CONFIGS[form]}))
    stored, wide = {}, {}
    for name, array in tensors.items():
        narrow = "_proj." in name or ".experts." in name
        parts, numbers = _narrow(form, array.astype(np.float32)) if narrow else ({}, array)
        wide[name] = numbers if exactly and narrow else numbers.astype(ml_dtypes.bfloat16)
        stored |= {name.replace("weight", key): part for key, part in parts.items()} or {name: array}
    write_shards(folder, stored, 2)
    write_shards(plain, wide, 2)
    return plain


def _narrow(form: str, w: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    if form == "int4-32":
        return _int4(w, 32)
    return {"nvfp4": _nvfp4, "mxfp4": _mxfp4, "awq": _awq}.get(form, lambda w: _int4(w, 16))(w)


def _awq(w: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Groups of 32 with zero points; four bits of a word are outputs in AWQ's order."""
    groups = w.reshape(len(w), -1, 32)
    low, high = groups.min(-1), groups.max(-1)
    scale = ((high - low) / 15).astype(np.float16)
    zero = np.clip(np.rint(-low / scale.astype(np.float32)), 0, 15).astype(np.int64)
    q = np.clip(np.rint(groups / scale.astype(np.float32)[..., None]) + zero[..., None], 0, 15).astype(np.int64)
    wide = ((q - zero[..., None]) * scale.astype(np.float32)[..., None]).astype(np.float32).reshape(w.shape)

    def words(values: np.ndarray) -> np.ndarray:
        eights = values.reshape(len(values), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]] << (4 * np.arange(8))
        return np.ascontiguousarray(eights.sum(-1).astype(np.uint32)).view(np.int32)  # files have rows

    return {"qweight": words(q.reshape(w.shape).T), "qzeros": words(zero.T), "scales": scale.T.copy()}, wide


def _mxfp4(w: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    groups = w.reshape(len(w), -1, 32)
    exponent = np.ceil(np.log2(np.abs(groups).max(-1) / 6))
    scale = np.exp2(exponent).astype(np.float32)[..., None]
    codes = np.abs((groups / scale)[..., None] - FP4).argmin(-1).astype(np.uint8)
    wide = (FP4[codes] * scale).reshape(w.shape)
    codes = codes.reshape(len(w), -1)
    return {
        "weight_packed": codes[:, ::2] | codes[:, 1::2] << 4,
        "weight_scale": (exponent + 127).astype(np.uint8),
    }, wide


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
