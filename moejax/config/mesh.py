"""A mesh of the ranks alive, and arrays of it made from what each rank already holds."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moejax.axes import RANKS


def make_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """The one-axis mesh over `devices`, in that order."""
    return Mesh(np.array(list(devices)), (RANKS,), axis_types=(AxisType.Auto,))


def global_array(mesh: Mesh, spec: PartitionSpec, local: jax.Array) -> jax.Array:
    """The array of `mesh` whose shard on this process is `local`, without a copy.

    Every axis that `spec` names is `mesh.size` times as long as in `local`.
    """
    shape = tuple(
        size * (mesh.size if axis < len(spec) and spec[axis] == RANKS else 1) for axis, size in enumerate(local.shape)
    )
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, spec), [local])
