"""FP8 and int8: each number is multiplied with the scale of its tensor, row, block or group.

DeepSeek-V3 (arXiv 2412.19437, 3.3.2) has `X_scale_inv` for blocks of 128 x 128; compressed-tensors and modelopt have
`X_scale` of a tensor, of each output, of blocks or of groups of 32 (MXFP8, with exponents for scales).
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from moejax.checkpoint.quantized.form import (
    Needed,
    QuantizedTensor,
    Shape,
    packed_bytes,
    row_chunks,
    widen_scale,
)
from moejax.config.int4 import Planes
from moejax.config.packed_form import NumberType, PackedForm
from planner.inputs.published.quantization import Scheme

BLOCK = (128, 128)
"""Of FP8 weights whose configuration does not say it."""
NUMBERS: dict[str, NumberType] = {"F8_E4M3": "fp8", "I8": "int8"}
"""Numbers that ranks hold as they are published, by their names in safetensors."""


@dataclasses.dataclass(frozen=True)
class ScaledTensor(QuantizedTensor):
    """Numbers in FP8 or int8 `[..., rows, columns]`, and their scales."""

    scheme: Scheme

    @property
    def shape(self) -> Shape:
        """See QuantizedTensor."""
        return self.stored_shape

    def needed(self) -> list[tuple[str, Needed]]:
        """See QuantizedTensor."""
        scale = self.parts.get("scale")
        name = f"{self.name}_scale_inv" if scale is None else scale.name
        shapes = self._shapes(name)
        found = [("scale", Needed(name, shapes))]
        if zero := self.parts.get("zero"):
            found.append(("zero", Needed(zero.name, shapes if scale is None else (scale.shape,))))
        return found

    @property
    def packed(self) -> PackedForm | None:
        """See QuantizedTensor."""
        numbers = NUMBERS.get(self.parts["numbers"].dtype)
        if numbers is None or "scale" not in self.parts:
            return None
        scale, blocks = self.parts["scale"], self._has_blocks(self.parts["scale"].name)
        group = self._block[1] if blocks or self.scheme.group else 0
        rows = self._block[0] if blocks else 1
        return packed_bytes(numbers, scale, group, rows=rows, zeros="zero" in self.parts)

    def planes(self, parts: Mapping[str, np.ndarray]) -> Planes:
        """See QuantizedTensor. Scales and zero points have a number for each row and group."""
        numbers = parts["numbers"]
        codes = numbers if numbers.dtype == np.int8 else numbers.view(np.uint8)
        zero = self._by_each_row(parts["zero"].astype(np.int16), numbers.shape) if "zero" in parts else None
        scale = self._by_each_row(parts["scale"], numbers.shape)
        return Planes(codes, scale, zero, group=0 if scale.shape[-1] == 1 else self._block[1])

    def _by_each_row(self, scale: np.ndarray, shape: Shape) -> np.ndarray:
        """Scales `[..., rows, groups]`, of one group where all columns share them."""
        by_row, (rows, columns) = self._by_row(scale, shape), shape[-2:]
        size = self._sizes(rows, columns, by_row.shape)[0]
        return np.repeat(by_row, size, axis=-2)[..., :rows, :]

    def decode(self, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        """See QuantizedTensor."""
        numbers = parts["numbers"]
        scale = self._by_row(widen_scale(parts["scale"]), numbers.shape)
        zero = self._by_row(parts["zero"].astype(np.float32), numbers.shape) if "zero" in parts else None
        if numbers.ndim > 2:
            each = [self._matrix(n, scale[i], None if zero is None else zero[i]) for i, n in enumerate(numbers)]
            return np.stack(each)
        return self._matrix(numbers, scale, zero)

    def _matrix(self, numbers: np.ndarray, scale: np.ndarray, zero: np.ndarray | None) -> np.ndarray:
        rows, columns = numbers.shape
        wide = np.empty(numbers.shape, self.dtype)
        for chunk in row_chunks(rows, columns):
            at = np.arange(chunk.start, chunk.stop) // self._sizes(rows, columns, scale.shape)[0]
            values = numbers[chunk].astype(np.float32)
            if zero is not None:
                values -= self._columns(zero[at], columns)
            wide[chunk] = values * self._columns(scale[at], columns)
        return wide

    def _columns(self, scale: np.ndarray, columns: int) -> np.ndarray:
        """Scales of rows, one for each column or one for all."""
        count = scale.shape[-1]
        if count in (1, columns):
            return scale
        return np.repeat(scale, self._size(columns, count, self._block[1]), axis=-1)[..., :columns]

    def _sizes(self, rows: int, columns: int, scale: Shape) -> tuple[int, int]:
        return self._size(rows, scale[-2], self._block[0]), self._size(columns, scale[-1], self._block[1])

    @staticmethod
    def _size(count: int, scales: int, block: int) -> int:
        """How many rows or columns share one of so many scales."""
        return count if scales == 1 else 1 if scales == count else block

    @property
    def _block(self) -> tuple[int, int]:
        if self.scheme.group:
            return 1, self.scheme.group
        return self.scheme.block or BLOCK

    def _has_blocks(self, name: str) -> bool:
        """Whether scales of this name are those of blocks."""
        return self.scheme.block is not None or name.endswith("_inv")

    def _shapes(self, name: str) -> tuple[Shape, ...]:
        """The shapes that scales of this name may have: as the configuration says, or, where it says nothing, of any
        kind."""
        *lead, rows, columns = self.shape
        block = self._block
        blocks = (*lead, -(-rows // block[0]), -(-columns // block[1]))
        if self._has_blocks(name):
            return blocks, (*lead, blocks[-2], 1, blocks[-1], 1)
        if self.scheme.group:
            return (blocks,)
        each = ((*lead, rows, 1), (*lead, rows), (*lead, 1, columns)) if lead else ((rows, 1), (rows,))
        whole = (tuple(lead), (*lead, 1), (*lead, 1, 1)) if lead else ((), (1,), (1, 1))
        return tuple(dict.fromkeys((*each, *whole, ())))

    @staticmethod
    def _by_row(scale: np.ndarray, shape: Shape) -> np.ndarray:
        """Scales with as many axes as the numbers: `[..., 1, 1]`, `[..., rows, 1]` or `[..., blocks, blocks]`."""
        lead, rows = shape[:-2], shape[-2]
        if scale.ndim == len(shape) + 2:
            return scale[..., 0, :, 0]
        if scale.ndim == len(shape):
            return scale
        if scale.size == 1:
            return np.broadcast_to(scale.reshape(1, 1), (*lead, 1, 1))
        if scale.ndim == len(shape) - 1 and scale.shape[-1] == rows:
            return scale[..., None]
        return scale.reshape(*lead, 1, 1)
