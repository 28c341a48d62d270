"""A mesh of the ranks alive, and arrays of the mesh made from each rank's own shard."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Shaped

from moejax.config.axes import RANKS, ArrayLike

if TYPE_CHECKING:

    class JaxDevice(Protocol):
        """A device of JAX: jaxlib ships no types, so this says what is used of it."""

        id: int
        process_index: int
        platform: str
        device_kind: str
        client: Any
else:
    JaxDevice = jax.Device


def make_mesh(devices: Sequence[JaxDevice]) -> Mesh:
    """The one-axis mesh over `devices`, in that order."""
    return Mesh(np.array(list(devices)), (RANKS,), axis_types=(AxisType.Auto,))


def global_shape(mesh: Mesh, spec: PartitionSpec, local: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the array of `mesh` that has shards of shape `local`: every axis that `spec` shards is `mesh.size`
    times as long."""
    return tuple(
        size * (mesh.size if axis < len(spec) and spec[axis] == RANKS else 1) for axis, size in enumerate(local)
    )


def global_array(mesh: Mesh, spec: PartitionSpec, local: Shaped[ArrayLike, "..."]) -> Shaped[ArrayLike, "..."]:
    """The array of `mesh` whose shard on this process is `local`, without a copy."""
    shape = global_shape(mesh, spec, local.shape)
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, spec), [local])
