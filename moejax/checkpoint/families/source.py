"""Where each parameter array lies in a published checkpoint, and the transform that makes it, in NumPy of any dtype."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Transform(Protocol):
    """Makes one parameter array of the tensors of a checkpoint, in order. It moves numbers and computes none, but for
    PlusOne."""

    def shapes(self, target: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Shapes of the tensors that make an array of shape `target`."""
        ...

    def __call__(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The parameter array."""
        ...


class OfRows:
    """Base of the transforms that move whole rows: they apply in the same way to one number for each row."""

    def __call__(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """See Transform."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Identity(OfRows):
    """The tensor as it is."""

    def shapes(self, target: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """See Transform."""
        return (target,)

    def __call__(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """See Transform."""
        return parts[0]


IDENTITY = Identity()


@dataclasses.dataclass(frozen=True)
class ConcatRows(OfRows):
    """Tensors below each other, of these many rows: queries, keys and values."""

    sizes: tuple[int, ...]

    def shapes(self, target: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """See Transform."""
        return tuple((size, *target[1:]) for size in self.sizes)

    def __call__(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """See Transform."""
        return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class ConcatHalves(OfRows):
    """Two tensors of equal shape below each other: gate above up."""

    def shapes(self, target: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """See Transform."""
        return ((target[0] // 2, *target[1:]),) * 2

    def __call__(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """See Transform."""
        return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class Transposed:
    """`[in, out]` to `[out, in]`; with `alternate`, outputs 0, 2, 4 ... come first, then 1, 3, 5 ..."""

    alternate: bool = False

    def shapes(self, target: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """See Transform."""
        return (target[::-1],)

    def __call__(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """See Transform."""
        turned = parts[0].T
        return np.concatenate([turned[::2], turned[1::2]]) if self.alternate else turned


@dataclasses.dataclass(frozen=True)
class Row:
    """The only row of `[1, size]`."""

    def shapes(self, target: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """See Transform."""
        return ((1, *target),)

    def __call__(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """See Transform."""
        return parts[0][0]


@dataclasses.dataclass(frozen=True)
class MiddleRow:
    """`[a, 1, b]` as `[a, b]`: the weights of a convolution in which each channel is by itself. With `sizes` tensors of
    so many channels below each other."""

    sizes: tuple[int, ...] = ()

    def shapes(self, target: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """See Transform."""
        return tuple((size, 1, *target[1:]) for size in self.sizes or target[:1])

    def __call__(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """See Transform."""
        return np.concatenate(parts)[:, 0] if self.sizes else parts[0][:, 0]


@dataclasses.dataclass(frozen=True)
class Flattened:
    """A vector that is published with this shape."""

    shape: tuple[int, ...]

    def shapes(self, target: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """See Transform."""
        return (self.shape,)

    def __call__(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """See Transform."""
        return parts[0].reshape(-1)


@dataclasses.dataclass(frozen=True)
class PickedRows(OfRows):
    """Rows of a tensor that lies group by group, each of which has as many rows of every kind as `sizes` says: all rows
    of the first kind of `picked`, then all of the next. Further tensors, with the numbers of rows in `below`, follow
    whole."""

    groups: int
    sizes: tuple[int, ...]
    picked: tuple[int, ...]
    below: tuple[int, ...] = ()

    def shapes(self, target: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """See Transform."""
        return tuple((rows, *target[1:]) for rows in (self.groups * sum(self.sizes), *self.below))

    def __call__(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """See Transform."""
        first, *others = parts
        by_kind = np.split(first.reshape(self.groups, -1, *first.shape[1:]), np.cumsum(self.sizes)[:-1], axis=1)
        return np.concatenate([by_kind[kind].reshape(-1, *first.shape[1:]) for kind in self.picked] + others)


@dataclasses.dataclass(frozen=True)
class PlusOne:
    """The scales of a norm that are published less 1: in float32, which has the sum exactly enough."""

    def shapes(self, target: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """See Transform."""
        return (target,)

    def __call__(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """See Transform."""
        return parts[0].astype(np.float32) + np.float32(1)


@dataclasses.dataclass(frozen=True)
class SourceTensor:
    """One tensor of a checkpoint: its name, the shape it must have there, and which `index` of its first axis is
    wanted (one contiguous range of bytes), or all of it (None)."""

    name: str
    shape: tuple[int, ...]
    index: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArraySource:
    """One array of the parameter tree, and where it comes from.

    `path` is the leaf's name as in `moejax.checkpoint.manifest.named` (`segments.0.1.moe.experts.down`), `repeat` the
    array's place on the leaf's first axis (None outside the layers), `expert` on the second (None unless a routed
    expert's), `shape` the array's own, `layer` the decoder layer it belongs to (None outside).
    """

    path: str
    repeat: int | None
    expert: int | None
    layer: int | None
    shape: tuple[int, ...]
    tensors: tuple[SourceTensor, ...]
    transform: Transform

    def array(self, parts: Sequence[np.ndarray], dtype: Any = np.float32) -> np.ndarray:
        """The array from what was read of each of `tensors`, in order. Zeros where the family has no such tensor."""
        if not self.tensors:
            return np.zeros(self.shape, dtype)
        return self.transform(parts).astype(dtype, copy=False)
