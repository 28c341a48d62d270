"""What parity takes of one rank: its experts' weights in pieces, the parity that it keeps in host memory, and experts
that were made again for it.

Weights are bytes here, in the form in which ranks hold them, so that what is made again is what was lost in every bit.
Which experts belong together, and what XORs to what, is the front's business.
"""

from collections.abc import Collection
from typing import NamedTuple

import jax
import numpy as np

from moejax.recovery import LiveArrays


class ParityError(RuntimeError):
    """Weights that are not here, or are not what they should be."""


class Weights(NamedTuple):
    """One expert of a MoE layer; or with `parity` the XOR of all of these."""

    layer: int
    experts: tuple[int, ...]
    parity: bool = False


class Piece(NamedTuple):
    """Some bytes of weights, how many there are in all, and with the first ones `LiveArrays.checksums` of an expert."""

    rows: bytes
    size: int
    checksums: tuple[int, ...] = ()


class Shelf:
    """One rank's parity, beside its slots."""

    def __init__(self, arrays: LiveArrays) -> None:
        self._arrays = arrays
        self._whole: dict[Weights, np.ndarray] = {}
        """What is kept, and an expert of which not all bytes have come, uint8."""

    def read(self, of: Weights, first: int, count: int) -> Piece:
        """Bytes `first` .. `first + count - 1`. Raises ParityError for what is not here or, at the first of them, not
        intact."""
        if of.parity:
            if of not in self._whole:
                raise ParityError(f"the parity of experts {list(of.experts)} of MoE layer {of.layer} is not kept here")
            return Piece(self._whole[of][first : first + count].tobytes(), self._whole[of].size)
        layer, (expert,) = of.layer, of.experts
        slots = np.flatnonzero(self._arrays.held[layer] == expert)
        if not len(slots):
            raise ParityError(f"expert {expert} of MoE layer {layer} is in no slot here")
        if first == 0 and not self._arrays.is_intact(layer, slots[0]):
            raise ParityError(f"expert {expert} of MoE layer {layer} is not intact here")
        leaves = [_bytes(leaf) for leaf in jax.tree.leaves(self._arrays.expert(layer, slots[0]))]
        checksums = self._arrays.checksums((layer, expert)) if first == 0 else ()
        return Piece(_cut(leaves, first, count), sum(leaf.size for leaf in leaves), checksums)

    def write(self, of: Weights, first: int, size: int, rows: bytes, checksums: tuple[int, ...] = ()) -> None:
        """Bytes from `first` on, in order, of `size` in all. A parity is kept; an expert is for the next plan that has
        it. Raises ParityError, at its end, when it is not what it should be."""
        if first == 0:
            if not of.parity:  # one expert arrives at a time: what came of another is of no use any more
                self._whole = {known: whole for known, whole in self._whole.items() if known.parity}
            self._whole[of] = np.zeros(size, np.uint8)
        whole = self._whole.get(of)
        end = first + len(rows)
        if whole is None or whole.size != size or end > size:
            raise ParityError(f"bytes {first} to {end} of {size} of {of} do not follow on what came before")
        whole[first:end] = np.frombuffer(rows, np.uint8)
        if end == size and not of.parity:
            del self._whole[of]
            if not self._arrays.give((of.layer, of.experts[0]), whole, checksums):
                raise ParityError(f"expert {of.experts[0]} of MoE layer {of.layer} was made again with other weights")

    def keep_only(self, layer: int, parities: Collection[Weights]) -> None:
        """Forget what else is kept of a layer."""
        kept = {*parities, *(of for of in self._whole if of.layer != layer or not of.parity)}
        self._whole = {of: whole for of, whole in self._whole.items() if of in kept}


def _bytes(leaf: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)


def _cut(leaves: list[np.ndarray], first: int, count: int) -> bytes:
    """Bytes `first` .. `first + count - 1` of what the leaves have one after the other."""
    parts, at = [], 0
    for leaf in leaves:
        parts.append(leaf[max(first - at, 0) : max(first + count - at, 0)].tobytes())
        at += leaf.size
    return b"".join(parts)
