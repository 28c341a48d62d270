"""A matrix that is stored in several tensors: its numbers in few bits, and the scales that they are multiplied with."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from moejax.checkpoint.manifest import CheckpointError
from moejax.config.int4 import Planes
from moejax.config.packed_form import GROUP, NumberType, PackedForm, ScaleType

Shape = tuple[int, ...]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
CHUNK = 16 << 20
"""Numbers that are widened at once: 64 MiB in float32, beside the array that they are written to."""
_BIAS = 127
"""Of the exponents E8M0 (OCP Microscaling 1.0, 5.4.1)."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: its name, its file, its form there, and the bytes from `start`."""

    name: str
    file: Path
    dtype: str
    shape: Shape
    start: int


Load = Callable[[StoredTensor, int | None], np.ndarray]
"""Reads a stored tensor, or one index of its first axis."""


@dataclasses.dataclass(frozen=True)
class Needed:
    """A stored tensor that a form needs: the name it has in checkpoints, and the shapes it may have."""

    name: str
    shapes: tuple[Shape, ...]


@dataclasses.dataclass(frozen=True)
class QuantizedTensor(abc.ABC):
    """One matrix, or the matrices of all experts on a first axis.

    `parts` are the stored tensors by their role. `wide` is the number format that products with 32-bit scales, with
    powers of two and with FP8 scales come out in; those with 16-bit scales come out in the format of the scales, as
    compressed-tensors, AutoAWQ and GPTQModel compute them.
    """

    name: str
    format: str
    parts: Mapping[str, StoredTensor]
    wide: np.dtype

    @property
    def packed(self) -> PackedForm | None:
        """The form in which ranks can hold the numbers as they are, if scales and zero points are those of groups in
        order; None where there is none."""
        return None

    def planes(self, parts: Mapping[str, np.ndarray]) -> Planes:
        """The numbers as they are stored and what scales each of them, in the shape that `decode` gives. Only where
        there is a `packed` form."""
        raise NotImplementedError(f"{self.format} is not held as it is published")

    @property
    @abc.abstractmethod
    def shape(self) -> Shape:
        """Shape of the numbers, once widened."""

    @abc.abstractmethod
    def needed(self) -> list[tuple[str, Needed]]:
        """The role, the name and the shapes of each tensor whose shape is not free."""

    @abc.abstractmethod
    def decode(self, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        """The numbers `shape` (or of one index of its first axis) from those of the parts."""

    @property
    def stored_shape(self) -> Shape:
        """Shape of the numbers as they are stored."""
        return self.parts["numbers"].shape

    @property
    def file(self) -> Path:
        """The file that the numbers are in."""
        return self.parts["numbers"].file

    @property
    def dtype(self) -> np.dtype:
        """Number format of what is read."""
        scale = self.parts.get("scale")
        return {"F16": np.dtype(np.float16), "BF16": BFLOAT16}.get(scale.dtype if scale else "", self.wide)

    def check(self) -> None:
        """Raise CheckpointError for a part that is missing or has another shape than the numbers need."""
        for role, needed in self.needed():
            found, shapes = self.parts.get(role), " or ".join(map(str, needed.shapes))
            if found is None:
                raise CheckpointError(
                    f"{self.file}: tensor {needed.name} of shape {shapes}, the scales of a quantised one "
                    f"({self.format}), is missing."
                )
            if found.shape not in needed.shapes:
                raise CheckpointError(
                    f"{found.file}: tensor {needed.name} has shape {found.shape}; the weights, {self.format} of shape "
                    f"{self.stored_shape}, need {shapes}."
                )

    def read(self, load: Load, index: int | None = None) -> np.ndarray:
        """The numbers, or those of one index of the first axis: only their bytes."""
        return self.decode(self._load(load, index))

    def read_planes(self, load: Load, index: int | None = None) -> Planes:
        """As `read`, the numbers as they are stored."""
        return self.planes(self._load(load, index))

    def _load(self, load: Load, index: int | None) -> dict[str, np.ndarray]:
        lead = self.stored_shape[0]

        def part(stored: StoredTensor) -> np.ndarray:
            return load(stored, index if index is not None and stored.shape[:1] == (lead,) else None)

        return {role: part(stored) for role, stored in self.parts.items()}


def packed_integers(scale: StoredTensor | None, group: int, *, zeros: bool) -> PackedForm | None:
    """The form of integers of four bits with these scales, for groups of this many inputs (0: whole rows)."""
    if scale is None or scale.dtype not in ("F16", "BF16") or group % GROUP:
        return None
    return PackedForm(scale="float16" if scale.dtype == "F16" else "bfloat16", group=group, zeros=zeros)


_EIGHT_BIT_SCALES: dict[str, ScaleType] = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "U8": "e8m0",
    "F8_E8M0": "e8m0",
}


def packed_bytes(
    numbers: NumberType, scale: StoredTensor, group: int, *, rows: int = 1, zeros: bool = False
) -> PackedForm | None:
    """The form of numbers of eight bits with these scales, of so many rows and inputs (0: whole rows, whose scales are
    held in float32)."""
    held = _EIGHT_BIT_SCALES.get(scale.dtype)
    if held is None:
        return None
    return PackedForm(numbers=numbers, scale=held if group else "float32", group=group, rows=rows, zeros=zeros)


def spread(values: np.ndarray, group: int, columns: int) -> np.ndarray:
    """Numbers of groups `[..., groups]`, one for each of these columns."""
    return np.repeat(values, group or columns, axis=-1)[..., :columns]


def widen_scale(scale: np.ndarray) -> np.ndarray:
    """Scales in float32. Bytes are exponents of two (E8M0), as are those of float8_e8m0fnu."""
    if scale.dtype == np.uint8:
        return np.ldexp(np.float32(1), scale.astype(np.int32) - _BIAS)
    return scale.astype(np.float32)


def row_chunks(rows: int, columns: int) -> list[slice]:
    """Slices of rows that have CHUNK numbers at most, or are one row."""
    step = max(1, CHUNK // max(1, columns))
    return [slice(start, min(rows, start + step)) for start in range(0, rows, step)]
