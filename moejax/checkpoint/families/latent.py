"""Transforms of rotated pairs to halves, and of the two parts of the projection out of the latent."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moejax.checkpoint.families.source import OfRows


@dataclasses.dataclass(frozen=True)
class PairsToHalves(OfRows):
    """Rows of each of `heads`, whose last `rotated` rows lie in pairs, or with `leading` the first: all first ones of
    the pairs, then all second. Also numbers of vectors."""

    heads: int
    rotated: int
    leading: bool = False

    def shapes(self, target: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """See Transform."""
        return (target,)

    def __call__(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """See Transform."""
        rows = len(parts[0]) // self.heads
        first = 0 if self.leading else rows - self.rotated
        before, pairs, after = np.split(np.arange(rows), [first, first + self.rotated])
        order = np.concatenate([before, pairs[::2], pairs[1::2], after])
        return parts[0].reshape(self.heads, rows, -1)[:, order].reshape(parts[0].shape)


@dataclasses.dataclass(frozen=True)
class PairedHeads(OfRows):
    """Queries, keys and values below each other. The numbers that are rotated against each other, which are all of a
    head, lie in pairs in queries and keys, as in PairsToHalves."""

    heads: int
    kv_heads: int
    size: int

    def shapes(self, target: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """See Transform."""
        return tuple((heads * self.size, *target[1:]) for heads in (self.heads, self.kv_heads, self.kv_heads))

    def __call__(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """See Transform."""
        q, k, v = parts
        turned = [PairsToHalves(n, self.size)([each]) for n, each in ((self.heads, q), (self.kv_heads, k))]
        return np.concatenate([*turned, v])


@dataclasses.dataclass(frozen=True)
class KeyUp:
    """Each head's key rows of `[heads * (d_plain + d_value), d_latent]`, turned so that they take a query to the
    latent: `[heads, d_latent, d_plain]`."""

    heads: int
    d_plain: int
    d_value: int

    def shapes(self, target: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """See Transform."""
        return ((self.heads * (self.d_plain + self.d_value), target[1]),)

    def __call__(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """See Transform."""
        by_head = parts[0].reshape(self.heads, self.d_plain + self.d_value, -1)
        return by_head[:, : self.d_plain].swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class ValueUp(OfRows):
    """Each head's value rows of `[heads * (d_plain + d_value), d_latent]`: `[heads, d_value, d_latent]`."""

    heads: int
    d_plain: int
    d_value: int

    def shapes(self, target: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """See Transform."""
        return ((self.heads * (self.d_plain + self.d_value), target[2]),)

    def __call__(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """See Transform."""
        return parts[0].reshape(self.heads, self.d_plain + self.d_value, -1)[:, self.d_plain :]
