"""Whether the weights in a rank's memory are still those of the store, and a way to spoil them for tests.

Checks read host views: on a CPU they cost the checksum alone (2 GB/s). They run between two steps, on the thread that
owns the arrays, because filling a slot donates them.
"""

import jax
import numpy as np

from moejax.programs import LocalPrograms
from moejax.recovery import LiveArrays


def inspect(arrays: LiveArrays, first: int, count: int) -> list[tuple[int, int, int]]:
    """The (MoE layer, slot, expert) of damaged slots among `count` from slot number `first` of `[moe layers x slots]`
    on, 0 for all. They count as empty from then on, so that the next fill reads them again."""
    layers, slots = arrays.held.shape
    chosen = range(layers * slots) if count == 0 else range(first, min(first + count, layers * slots))
    found = []
    for layer, slot in (divmod(number, slots) for number in chosen):
        expert = int(arrays.held[layer, slot])
        if expert >= 0 and not arrays.is_intact(layer, slot):
            arrays.held[layer, slot] = -1
            found.append((layer, slot, expert))
    return found


def inspect_common(arrays: LiveArrays) -> list[str]:
    """Names of damaged weights among those that every rank has."""
    return arrays.damaged()


def damage(
    arrays: LiveArrays, layer: int, slot: int, local: LocalPrograms, device: jax.Device, *, nan: bool
) -> tuple[int, int, int]:
    """Spoil the weights in a slot: not-a-number, or one flipped bit. What was spoilt: (MoE layer, slot, expert)."""
    weights = jax.tree.map(np.array, arrays.expert(layer, slot))
    numbers = jax.tree.leaves(weights.down)[-1]  # of int8 the scale: the rest cannot be not-a-number
    first = numbers.reshape(-1)[:1]
    if nan:
        first[:] = np.nan
    else:
        first.view(np.uint8)[-2:] ^= np.uint8(1 << 6)
    arrays.put_expert(layer, slot, weights, local, device)
    return layer, slot, int(arrays.held[layer, slot])
