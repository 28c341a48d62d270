"""A small published model in few bits, and the same numbers in plain form."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.support.published import MIXTRAL, published_folder, write_shards

Narrow = tuple[dict[str, np.ndarray], np.ndarray]
"""The stored tensors of a matrix, by the ends of their names, and the numbers that they stand for."""
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def _pack_quantized(group: int) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "group_size": group, "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"g": {"weights": weights}},
    }


def _compressed(form: str, **weights: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"g": {"weights": weights}}}


BLOCK = (16, 16)
CONFIGS = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False},
    "mxfp4": _compressed("mxfp4-pack-quantized", num_bits=4, type="float", group_size=32),
    "int4": _pack_quantized(16),
    "int4-32": _pack_quantized(32),
    "int4-rows": _pack_quantized(-1),
    "int8": _compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
    "fp8-block": {"quant_method": "fp8", "weight_block_size": list(BLOCK)},
    "fp8-tensor": {"quant_method": "fp8"},
    "fp8-channel": _compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    "fp8-exponents": _compressed("mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32),
}
SMALL = ("int4", "nvfp4")
"""Forms whose groups divide the usual sizes."""
LARGE = {"hidden_size": 64, "intermediate_size": 96}
"""Sizes for all forms."""


def quantized_folders(
    folder: Path, form: str, *, wide: Any = ml_dtypes.bfloat16, seed: int = 0, sizes: Mapping[str, int] | None = None
) -> Path:
    """Write a Mixtral whose projections are in this form to `folder`, and the same numbers to the folder beside it that
    is returned: projections in the type `wide`, bfloat16 as most are widened, or float32, which has them exactly."""
    plain = folder.with_name(f"{folder.name}-plain")
    values = MIXTRAL | {"torch_dtype": "bfloat16"}
    values |= sizes or ({} if form in SMALL else LARGE)
    tensors = published_folder(plain, values, dtype=ml_dtypes.bfloat16, seed=seed)
    published_folder(folder, values)
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": CONFIGS[form]}))
    stored, plainly = {}, {}
    for name, array in tensors.items():
        chosen = "_proj." in name or ".experts." in name
        parts, numbers = narrow(form, array.astype(np.float32)) if chosen else ({}, array)
        plainly[name] = numbers.astype(wide if chosen else ml_dtypes.bfloat16)
        stored |= {name.replace("weight", key): part for key, part in parts.items()} or {name: array}
    write_shards(folder, stored, 2)
    write_shards(plain, plainly, 2)
    return plain


def narrow(form: str, w: np.ndarray) -> Narrow:
    """A matrix `[out, in]` in a form."""
    if form in ("int4-32", "int4-rows"):
        return _int4(w, 32 if form == "int4-32" else w.shape[1])
    return _NARROW.get(form, lambda w: _int4(w, 16))(w)


def _scaled(w: np.ndarray, scale: np.ndarray, spread: np.ndarray, *, key: str = "weight_scale") -> Narrow:
    """FP8 whose largest number is 448, and the scales as they are spread over the matrix."""
    held = (w / spread).astype(ml_dtypes.float8_e4m3fn)
    return {"weight": held, key: scale}, held.astype(np.float32) * spread


def _fp8_tensor(w: np.ndarray) -> Narrow:
    scale = np.array(np.abs(w).max() / 448, np.float32)
    return _scaled(w, scale, scale)


def _fp8_channel(w: np.ndarray) -> Narrow:
    scale = (np.abs(w).max(-1, keepdims=True) / 448).astype(np.float32)
    return _scaled(w, scale, scale)


def _fp8_block(w: np.ndarray) -> Narrow:
    rows, columns = (-(-n // size) for n, size in zip(w.shape, BLOCK, strict=True))
    filled = np.pad(w, [(0, n * size - m) for n, size, m in zip((rows, columns), BLOCK, w.shape, strict=True)])
    scale = (np.abs(filled.reshape(rows, BLOCK[0], columns, BLOCK[1])).max((1, 3)) / 448).astype(np.float32)
    spread = np.kron(scale, np.ones(BLOCK, np.float32))[: len(w), : w.shape[1]]
    return _scaled(w, scale, spread, key="weight_scale_inv")


def _fp8_exponents(w: np.ndarray) -> Narrow:
    exponent = np.ceil(np.log2(np.abs(w.reshape(len(w), -1, 32)).max(-1) / 448)).astype(np.int64)
    spread = np.repeat(np.exp2(exponent.astype(np.float32)), 32, axis=-1)
    return _scaled(w, (exponent + 127).astype(np.uint8), spread)


def _int8(w: np.ndarray) -> Narrow:
    scale = (np.abs(w).max(-1, keepdims=True) / 127).astype(np.float32)
    held = np.clip(np.rint(w / scale), -127, 127).astype(np.int8)
    return {"weight": held, "weight_scale": scale}, held.astype(np.float32) * scale


def _gptq(w: np.ndarray) -> Narrow:
    """As `_awq`, with words along the inputs, and zero points stored less one."""
    q, zero, scale, wide = _with_zeros(w, lowest=1)

    def words(values: np.ndarray) -> np.ndarray:
        eights = values.reshape(len(values), -1, 8) << (4 * np.arange(8))
        return np.ascontiguousarray(eights.sum(-1).astype(np.uint32)).view(np.int32)

    groups = np.arange(w.shape[1], dtype=np.int32) // 32
    parts = {"qweight": np.ascontiguousarray(words(q.reshape(w.shape)).T), "qzeros": words(zero.T - 1)}
    return parts | {"scales": scale.T.copy(), "g_idx": groups}, wide


def _with_zeros(w: np.ndarray, *, lowest: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Integers `[out, groups, 32]`, zero points of at least `lowest`, scales, and the numbers."""
    groups = w.reshape(len(w), -1, 32)
    low, high = groups.min(-1), groups.max(-1)
    scale = ((high - low) / 15).astype(np.float16)
    zero = np.clip(np.rint(-low / scale.astype(np.float32)), lowest, 15).astype(np.int64)
    q = np.clip(np.rint(groups / scale.astype(np.float32)[..., None]) + zero[..., None], 0, 15).astype(np.int64)
    wide = ((q - zero[..., None]) * scale.astype(np.float32)[..., None]).astype(np.float32).reshape(w.shape)
    return q, zero, scale, wide


def _awq(w: np.ndarray) -> Narrow:
    """Groups of 32 with zero points; four bits of a word are outputs in AWQ's order."""
    q, zero, scale, wide = _with_zeros(w)

    def words(values: np.ndarray) -> np.ndarray:
        eights = values.reshape(len(values), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]] << (4 * np.arange(8))
        return np.ascontiguousarray(eights.sum(-1).astype(np.uint32)).view(np.int32)  # files have rows

    return {"qweight": words(q.reshape(w.shape).T), "qzeros": words(zero.T), "scales": scale.T.copy()}, wide


def _mxfp4(w: np.ndarray) -> Narrow:
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


def _int4(w: np.ndarray, group: int) -> Narrow:
    groups = w.reshape(len(w), -1, group)
    scale = (np.abs(groups).max(-1) / 7).astype(ml_dtypes.bfloat16)
    q = np.clip(np.rint(groups / scale.astype(np.float32)[..., None]), -8, 7).astype(np.int64)
    wide = (q * scale.astype(np.float32)[..., None]).astype(np.float32).reshape(w.shape)
    eights = (q + 8).reshape(len(w), -1, 8) << (4 * np.arange(8))
    words = eights.sum(-1).astype(np.uint32).view(np.int32)
    return {"weight_packed": words, "weight_scale": scale, "weight_shape": np.array(w.shape, np.int64)}, wide


def _nvfp4(w: np.ndarray) -> Narrow:
    groups = w.reshape(len(w), -1, 16)
    whole = np.array(np.abs(w).max() / (6 * 448), np.float32)
    scale = (np.abs(groups).max(-1) / 6 / whole).astype(ml_dtypes.float8_e4m3fn)
    by_group = scale.astype(np.float32)[..., None] * whole
    codes = np.abs(groups[..., None] / by_group[..., None] - FP4).argmin(-1).astype(np.uint8).reshape(len(w), -1)
    wide = (FP4[codes].reshape(groups.shape) * by_group).reshape(w.shape)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    return {"weight": packed, "weight_scale": scale, "weight_scale_2": whole}, wide


_NARROW = {
    "nvfp4": _nvfp4,
    "mxfp4": _mxfp4,
    "awq": _awq,
    "gptq": _gptq,
    "int8": _int8,
    "fp8-block": _fp8_block,
    "fp8-tensor": _fp8_tensor,
    "fp8-channel": _fp8_channel,
    "fp8-exponents": _fp8_exponents,
}
