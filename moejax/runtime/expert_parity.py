"""A rank's side of expert parity: its experts' weights in pieces, the parity that it keeps in host memory, and experts
reconstructed for it.

Weights are bytes here, in the rank's weight format, so that a reconstructed expert equals the lost one in every bit.
The front decides which experts belong together and which XOR reconstructs which.
"""

from collections.abc import Collection
from typing import NamedTuple

import jax
import numpy as np

from moejax.runtime.live_weights import LiveArrays


class ParityError(RuntimeError):
    """Weights that this rank does not have, or that are damaged."""


class WeightsKey(NamedTuple):
    """Names one expert of a MoE layer, or with `parity` the XOR of all of these experts."""

    layer: int
    experts: tuple[int, ...]
    parity: bool = False


class WeightsPiece(NamedTuple):
    """Some bytes of weights and the size of the whole; the first piece of an expert also has `LiveArrays.checksums`."""

    rows: bytes
    size: int
    checksums: tuple[int, ...] = ()


class HostExpertBuffer:
    """Host memory of one rank for parity, and for an expert that arrives in pieces."""

    def __init__(self, arrays: LiveArrays) -> None:
        self._arrays = arrays
        self._whole: dict[WeightsKey, np.ndarray] = {}
        """Parities, and an expert of which some pieces are missing, uint8."""

    def read(self, key: WeightsKey, first: int, count: int) -> WeightsPiece:
        """Bytes `first` .. `first + count - 1`. Raises ParityError for weights that this rank does not have and, when
        `first` is 0, for damaged ones."""
        if key.parity:
            if key not in self._whole:
                raise ParityError(
                    f"the parity of experts {list(key.experts)} of MoE layer {key.layer} is not kept here"
                )
            return WeightsPiece(self._whole[key][first : first + count].tobytes(), self._whole[key].size)
        layer, (expert,) = key.layer, key.experts
        slots = np.flatnonzero(self._arrays.slot_experts[layer] == expert)
        if not len(slots):
            raise ParityError(f"expert {expert} of MoE layer {layer} is in no slot here")
        slot = int(slots[0])
        if first == 0 and not self._arrays.is_intact(layer, slot):
            raise ParityError(f"expert {expert} of MoE layer {layer} is not intact here")
        leaves = [_bytes(leaf) for leaf in jax.tree.leaves(self._arrays.expert(layer, slot))]
        checksums = self._arrays.checksums((layer, expert)) if first == 0 else ()
        return WeightsPiece(_cut(leaves, first, count), sum(leaf.size for leaf in leaves), checksums)

    def write(self, key: WeightsKey, first: int, size: int, rows: bytes, checksums: tuple[int, ...] = ()) -> None:
        """Store bytes from `first` on, in order, of `size` in all. A parity is kept; an expert is injected for the next
        plan that has it. Raises ParityError for a gap and, with the last piece, for an expert of other weights."""
        if first == 0:
            if not key.parity:  # one expert arrives at a time: pieces of another one are stale
                self._whole = {known: whole for known, whole in self._whole.items() if known.parity}
            self._whole[key] = np.zeros(size, np.uint8)
        whole = self._whole.get(key)
        end = first + len(rows)
        if whole is None or whole.size != size or end > size:
            raise ParityError(f"bytes {first} to {end} of {size} of {key} do not follow on what came before")
        whole[first:end] = np.frombuffer(rows, np.uint8)
        if end == size and not key.parity:
            del self._whole[key]
            if not self._arrays.inject((key.layer, key.experts[0]), whole, checksums):
                raise ParityError(
                    f"expert {key.experts[0]} of MoE layer {key.layer} arrived with bytes that are not its weights"
                )

    def clear(self) -> None:
        """Drop everything: it is of weights that this rank does not have any more."""
        self._whole = {}

    def keep_only(self, layer: int, parities: Collection[WeightsKey]) -> None:
        """Drop all other parities of a layer."""
        kept = {*parities, *(key for key in self._whole if key.layer != layer or not key.parity)}
        self._whole = {key: whole for key, whole in self._whole.items() if key in kept}


def _bytes(leaf: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)


def _cut(leaves: list[np.ndarray], first: int, count: int) -> bytes:
    """Bytes `first` .. `first + count - 1` of the leaves, one leaf after the other."""
    parts, at = [], 0
    for leaf in leaves:
        parts.append(leaf[max(first - at, 0) : max(first + count - at, 0)].tobytes())
        at += leaf.size
    return b"".join(parts)
