"""Finds damaged weights in a rank's memory by their checksums, and damages them for tests.

Checks read host views: on a CPU they cost the checksum alone (2 GB/s). They run between two steps, on the thread that
owns the arrays, because filling a slot donates them.
"""

import jax
import numpy as np

from moejax.config.mesh import JaxDevice
from moejax.runtime.live_weights import FillPrograms, LiveArrays


def find_damaged_slots(arrays: LiveArrays, first: int, count: int) -> list[tuple[int, int, int]]:
    """The (MoE layer, slot, expert) of damaged slots among `count` from slot number `first` of `[moe layers x slots]`
    on (0: all). They count as empty afterwards, so that the next fill reads them again."""
    layers, slots = arrays.slot_experts.shape[:2]
    chosen = range(layers * slots) if count == 0 else range(first, min(first + count, layers * slots))
    found = []
    for layer, slot in (divmod(number, slots) for number in chosen):
        expert = int(arrays.slot_experts[layer, slot])
        if expert >= 0 and not arrays.is_intact(layer, slot):
            arrays.slot_experts[layer, slot] = -1
            found.append((layer, slot, expert))
    return found


def find_damaged_common(arrays: LiveArrays) -> list[str]:
    """Names of damaged weights, experts aside."""
    return arrays.damaged()


def corrupt_slot(
    arrays: LiveArrays, layer: int, slot: int, local: FillPrograms, device: JaxDevice, *, nan: bool
) -> tuple[int, int, int]:
    """Damage the weights in a slot with not-a-number or one flipped bit; returns its (MoE layer, slot, expert)."""
    weights = jax.tree.map(np.array, arrays.expert(layer, slot))
    numbers = jax.tree.leaves(weights.down)[-1]  # of int8 the scale: the rest cannot be not-a-number
    first = numbers.reshape(-1)[:1]
    if nan and np.issubdtype(first.dtype, np.integer):
        first.view(np.uint8)[:] = 255  # of exponents of two (E8M0) what is no number
    elif nan:
        first[:] = np.nan
    else:
        first.view(np.uint8)[-2:] ^= np.uint8(1 << 6)
    arrays.put_expert(layer, slot, weights, local, device)
    return layer, slot, int(arrays.slot_experts[layer, slot])
