"""MXFP4 and NVFP4: numbers of four bits, two a byte, times the scale of their group.

MXFP4 (OCP Microscaling 1.0, 5.2) has groups of 32 and powers of two for scales; NVFP4 has groups of 16 and FP8 scales,
which a number of the tensor scales in turn: modelopt multiplies with it, compressed-tensors divides.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from moejax.checkpoint.quantized.form import BFLOAT16, Needed, QuantizedTensor, Shape, row_chunks, spread, widen_scale
from moejax.config.int4 import FP4, Planes
from moejax.config.packed_form import GROUP, PackedForm

_PAIRS = np.stack([FP4[np.arange(256) & 0x0F], FP4[np.arange(256) >> 4]], axis=-1)
"""The two numbers of each byte, the lower half first."""


@dataclasses.dataclass(frozen=True)
class Fp4Tensor(QuantizedTensor):
    """Bytes `[..., out, in / 2]`, scales `[..., out, in / group]`, and the number that scales these, if the form has
    one; `divides` says that it divides."""

    group: int
    divides: bool = False

    @property
    def shape(self) -> Shape:
        """See QuantizedTensor."""
        *lead, half = self.stored_shape
        return (*lead, 2 * half)

    @property
    def dtype(self) -> np.dtype:
        """See QuantizedTensor. MXFP4 is exact in bfloat16."""
        return BFLOAT16 if self.format == "mxfp4" else self.wide

    def needed(self) -> list[tuple[str, Needed]]:
        """See QuantizedTensor."""
        *lead, width = self.shape
        scales = Needed(self._name("scale", f"{self.name}_scale"), ((*lead, -(-width // self.group)),))
        if self.format == "mxfp4":
            return [("scale", scales)]
        experts = tuple(lead[:-1])
        whole = tuple(dict.fromkeys(((), (1,), experts, (*experts, 1), (*experts, 1, 1))))
        name = self._name("global", f"{self.name}_global_scale" if self.divides else f"{self.name}_scale_2")
        return [("scale", scales), ("global", Needed(name, whole))]

    def decode(self, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        """See QuantizedTensor."""
        packed, scale = parts["numbers"], widen_scale(parts["scale"])
        if "global" in parts:
            factor = parts["global"].astype(np.float32)
            factor = factor.reshape(-1, 1, 1) if factor.size > 1 else factor.reshape(())
            scale = scale / factor if self.divides else scale * factor
        return decode_fp4(packed, scale, self.group, self.dtype)

    @property
    def packed(self) -> PackedForm | None:
        """See QuantizedTensor."""
        exponents = self.parts["scale"].dtype in ("U8", "F8_E8M0") if "scale" in self.parts else False
        if exponents and self.format == "mxfp4" and self.group % GROUP == 0:
            return PackedForm(scale="e8m0", group=self.group)
        floats = "scale" in self.parts and self.parts["scale"].dtype == "F8_E4M3"
        if floats and "global" in self.parts and self.group % (GROUP // 2) == 0:
            return PackedForm(scale="e4m3", group=self.group)
        return None

    def planes(self, parts: Mapping[str, np.ndarray]) -> Planes:
        """See QuantizedTensor."""
        codes = _codes(parts["numbers"])
        scale, factor = spread(parts["scale"], self.group, codes.shape[-1]), None
        if "global" in parts:
            factor = parts["global"].astype(np.float32)
            factor = factor.reshape(-1, 1, 1) if factor.size > 1 else factor.reshape(())
            factor = np.broadcast_to(1 / factor if self.divides else factor, codes.shape)
        return Planes(codes, scale, factor=factor)

    def _name(self, role: str, usual: str) -> str:
        return self.parts[role].name if role in self.parts else usual


@dataclasses.dataclass(frozen=True)
class Fp4Blocks(QuantizedTensor):
    """gpt-oss's MXFP4: blocks `[E, out, in / 32, 16]` and their exponents `[E, out, in / 32]`. The numbers come out as
    `[E, in, out]`, as the same tensors are in bfloat16."""

    @property
    def shape(self) -> Shape:
        """See QuantizedTensor."""
        *lead, rows, groups, half = self.stored_shape
        return (*lead, groups * half * 2, rows)

    @property
    def dtype(self) -> np.dtype:
        """See QuantizedTensor."""
        return BFLOAT16

    def needed(self) -> list[tuple[str, Needed]]:
        """See QuantizedTensor."""
        return [("scale", Needed(f"{self.name}_scales", (self.stored_shape[:-1],)))]

    def decode(self, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        """See QuantizedTensor."""
        return dequantize_mxfp4(parts["numbers"], parts["scale"]).swapaxes(-1, -2)

    @property
    def packed(self) -> PackedForm | None:
        """See QuantizedTensor."""
        return PackedForm(scale="e8m0", group=GROUP) if self.stored_shape[-1] == GROUP // 2 else None

    def planes(self, parts: Mapping[str, np.ndarray]) -> Planes:
        """See QuantizedTensor."""
        *lead, _, _ = parts["numbers"].shape
        codes = _codes(parts["numbers"].reshape(*lead, -1))
        return Planes(codes.swapaxes(-1, -2), spread(parts["scale"], GROUP, codes.shape[-1]).swapaxes(-1, -2))


def _codes(packed: np.ndarray) -> np.ndarray:
    """Bytes `[..., in / 2]` as four bits each `[..., in]`, the lower half first."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def dequantize_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MXFP4 `[..., out, in / 32, 16]` (two numbers a byte, the lower half first) and the exponents
    `[..., out, in / 32]`, as bfloat16 `[..., out, in]`: exact, as each has three significant bits at most."""
    *lead, groups, half = blocks.shape
    return decode_fp4(blocks.reshape(*lead, groups * half), widen_scale(scales), 2 * half, BFLOAT16)


def decode_fp4(packed: np.ndarray, scale: np.ndarray, group: int, dtype: np.dtype) -> np.ndarray:
    """Bytes `[..., in / 2]` and float32 scales `[..., in / group]` as numbers `[..., in]`."""
    *lead, half = packed.shape
    wide = np.empty((*lead, 2 * half), dtype)
    flat, rows = wide.reshape(-1, 2 * half), packed.reshape(-1, half)
    scales = np.broadcast_to(scale, (*lead, scale.shape[-1])).reshape(len(rows), -1)
    for chunk in row_chunks(len(rows), 2 * half):
        values = _PAIRS[rows[chunk]].reshape(-1, 2 * half)
        flat[chunk] = values * np.repeat(scales[chunk], group, axis=-1)[:, : 2 * half]
    return wide
