"""Integers of few bits, packed into words of 32, with scales and zero points of groups of inputs.

compressed-tensors (`pack-quantized`) packs along the inputs of `[out, in]`, bit by bit without gaps; GPTQ packs along
the inputs of `[in, out]` and may order its groups by `g_idx`; AWQ packs along the outputs of `[in, out]`, in an order
of its own (AutoAWQ, `awq/utils/packing_utils.py`).
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from moejax.checkpoint.quantized.form import (
    Needed,
    QuantizedTensor,
    Shape,
    StoredTensor,
    packed_bytes,
    packed_integers,
    row_chunks,
)
from moejax.config.int4 import Planes
from moejax.config.packed_form import PackedForm
from planner.inputs.published.quantization import Scheme

WORD = 32
_MIDDLE = 128
"""The unsigned integer of eight bits that is held as zero."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output that each four bits of a word hold, from the lowest."""


@dataclasses.dataclass(frozen=True)
class PackedTensor(QuantizedTensor):
    """compressed-tensors' words `[out, in * bits / 32]`, scales `[out, groups]`, zero points packed along the outputs
    `[out * bits / 32, groups]` or not packed, and the group of each input, if these are ordered. `full` is the shape of
    the numbers, which `X_shape` has."""

    scheme: Scheme
    full: Shape

    @property
    def packed(self) -> PackedForm | None:
        """See QuantizedTensor."""
        return _form(self.parts.get("scale"), self.scheme, zeros="zero" in self.parts)

    def planes(self, parts: Mapping[str, np.ndarray]) -> Planes:
        """See QuantizedTensor."""
        rows, columns = self.full
        scale, zero = parts["scale"], self._zero(parts.get("zero"), (rows, 0))
        scale = scale if scale.ndim == 2 else np.broadcast_to(scale.reshape(-1, 1), (rows, 1))
        index = parts["index"] if "index" in parts and (parts["index"] >= 0).all() else None
        at = np.arange(columns) // (self.scheme.group or columns) if index is None else index
        codes = unpack(parts["numbers"], self.scheme.bits, columns)
        if self.scheme.bits == 8:
            return Planes(_signed(codes), scale[:, at], None if zero is None else zero.astype(np.int16)[:, at])
        return Planes(codes, scale[:, at], None if zero is None else (zero + 8).astype(np.uint8)[:, at])

    @property
    def shape(self) -> Shape:
        """See QuantizedTensor."""
        return self.full

    def needed(self) -> list[tuple[str, Needed]]:
        """See QuantizedTensor."""
        rows, columns = self.full
        group = self.scheme.group
        groups = -(-columns // group) if group else 1
        scales = ((rows, groups),) if group else ((rows, 1), (rows,), (1,), ())
        found = [
            ("numbers", Needed(f"{self.name}_packed", ((rows, self._words(columns)),))),
            ("scale", Needed(f"{self.name}_scale", scales)),
        ]
        if zero := self.parts.get("zero"):
            packed = ((self._words(rows), groups),) if zero.dtype == "I32" else scales
            found.append(("zero", Needed(zero.name, packed)))
        if index := self.parts.get("index"):
            found.append(("index", Needed(index.name, ((columns,),))))
        return found

    def decode(self, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        """See QuantizedTensor."""
        (rows, columns), bits = self.full, self.scheme.bits
        scale = _by_group(parts["scale"], rows)
        zero = self._zero(parts.get("zero"), scale.shape)
        index = parts["index"] if "index" in parts and (parts["index"] >= 0).all() else None
        if index is None:
            index = np.arange(columns) // (self.scheme.group or columns)
        wide = np.empty(self.full, self.dtype)
        for chunk in row_chunks(rows, columns):
            values = unpack(parts["numbers"][chunk], bits, columns).astype(np.float32) - (1 << (bits - 1))
            if zero is not None:
                values -= zero[chunk][:, index]
            wide[chunk] = values * scale[chunk][:, index]
        return wide

    def _zero(self, zero: np.ndarray | None, shape: Shape) -> np.ndarray | None:
        if zero is None or zero.dtype != np.int32:
            return None if zero is None else _by_group(zero, shape[0])
        bits = self.scheme.bits
        return unpack(np.ascontiguousarray(zero.T), bits, shape[0]).T.astype(np.float32) - (1 << (bits - 1))

    def _words(self, count: int) -> int:
        return -(-count * self.scheme.bits // WORD)


@dataclasses.dataclass(frozen=True)
class OutputsLastTensor(QuantizedTensor):
    """AWQ's and GPTQ's words, zero points, scales `[groups, out]` and, of GPTQ, the group of each input. The numbers
    come out as `[out, in]`."""

    scheme: Scheme

    @property
    def packed(self) -> PackedForm | None:
        """See QuantizedTensor. Whether zero points are all in the middle, and groups in order, numbers alone show."""
        return _form(self.parts.get("scale"), self.scheme, zeros=not self.scheme.plain)

    def planes(self, parts: Mapping[str, np.ndarray]) -> Planes:
        """See QuantizedTensor."""
        inputs = self.shape[1]
        zero = self._along_outputs(parts["zero"]) + np.uint8(self.scheme.zero_offset)
        index = parts.get("index", np.arange(inputs) // (self.scheme.group or inputs))
        if self._awq:
            codes = self._along_outputs(parts["numbers"]).T
        else:
            codes = unpack(np.ascontiguousarray(parts["numbers"].T), self.scheme.bits, inputs)
        if self.scheme.bits == 8:
            middle = self._along_outputs(parts["zero"]).astype(np.int16) + self.scheme.zero_offset - _MIDDLE
            return Planes(_signed(np.ascontiguousarray(codes)), parts["scale"][index].T, middle[index].T)
        return Planes(np.ascontiguousarray(codes), parts["scale"][index].T, zero[index].T)

    @property
    def shape(self) -> Shape:
        """See QuantizedTensor."""
        rows, columns = self.stored_shape
        each = WORD // self.scheme.bits
        return (columns * each, rows) if self._awq else (columns, rows * each)

    def needed(self) -> list[tuple[str, Needed]]:
        """See QuantizedTensor."""
        outputs, inputs = self.shape
        groups = -(-inputs // self.scheme.group) if self.scheme.group else 1
        stem = self.name.removesuffix("weight")
        found = [
            ("scale", Needed(f"{stem}scales", ((groups, outputs),))),
            ("zero", Needed(f"{stem}qzeros", ((groups, outputs * self.scheme.bits // WORD),))),
        ]
        if index := self.parts.get("index"):
            found.append(("index", Needed(index.name, ((inputs,),))))
        return found

    def decode(self, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        """See QuantizedTensor."""
        (outputs, inputs), bits = self.shape, self.scheme.bits
        scale = parts["scale"].astype(np.float32)
        zero = self._along_outputs(parts["zero"]).astype(np.float32) + self.scheme.zero_offset
        index = parts.get("index", np.arange(inputs) // (self.scheme.group or inputs))
        packed = parts["numbers"] if self._awq else np.ascontiguousarray(parts["numbers"].T)
        wide = np.empty((outputs, inputs), self.dtype)
        if self._awq:
            for chunk in row_chunks(inputs, outputs):
                values, at = self._along_outputs(packed[chunk]).astype(np.float32), index[chunk]
                wide[:, chunk] = ((values - zero[at]) * scale[at]).T
            return wide
        for chunk in row_chunks(outputs, inputs):
            values = unpack(packed[chunk], bits, inputs).astype(np.float32)
            wide[chunk] = (values - zero[:, chunk].T[:, index]) * scale[:, chunk].T[:, index]
        return wide

    @property
    def _awq(self) -> bool:
        return self.scheme.packing == "awq"

    def _along_outputs(self, words: np.ndarray) -> np.ndarray:
        """Words `[n, out * bits / 32]` as integers `[n, out]`."""
        count = words.shape[1] * WORD // self.scheme.bits
        found = unpack(words, self.scheme.bits, count)
        if not self._awq:
            return found
        ordered = np.empty_like(found)
        for place, output in enumerate(AWQ_ORDER):
            ordered[:, output :: len(AWQ_ORDER)] = found[:, place :: len(AWQ_ORDER)]
        return ordered


def _form(scale: StoredTensor | None, scheme: Scheme, *, zeros: bool) -> PackedForm | None:
    """The form of integers of four or eight bits."""
    if scheme.bits == 4:
        return packed_integers(scale, scheme.group, zeros=zeros)
    if scheme.bits == 8 and scale is not None:
        return packed_bytes("int8", scale, scheme.group, zeros=zeros)
    return None


def _signed(codes: np.ndarray) -> np.ndarray:
    """Unsigned integers of eight bits less `_MIDDLE`, as int8."""
    return (codes ^ np.uint8(_MIDDLE)).view(np.int8)


def _by_group(scale: np.ndarray, rows: int) -> np.ndarray:
    """Scales or zero points `[rows, groups]` in float32, of one number for all, one for each row, or as they are."""
    scale = scale.astype(np.float32)
    return scale if scale.ndim == 2 else np.broadcast_to(scale.reshape(-1, 1), (rows, 1))


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` unsigned integers of `bits` in each row of int32 words, from the lowest bits, as uint8."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return octets[:, :count]
    if bits == 4:
        return np.stack([octets & 0x0F, octets >> 4], axis=-1).reshape(len(octets), -1)[:, :count]
    stream = np.unpackbits(octets, axis=-1, bitorder="little")[:, : count * bits].reshape(len(octets), count, bits)
    return np.packbits(stream, axis=-1, bitorder="little")[..., 0]
