"""The arguments of a step program, made of a rank's live arrays without a copy."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from moejax.config.mesh import JaxDevice, global_array
from moejax.config.params import map_experts, replace_experts
from moejax.runtime import steps
from moejax.runtime.live_weights import LiveArrays
from moejax.runtime.programs import MeshPrograms


def mesh_arguments(
    live: LiveArrays, programs: MeshPrograms, expert_to_slot: np.ndarray, tp_peers: Sequence[int] = ()
) -> Callable[[jax.Array], steps.StepArguments]:
    """The arguments of a step over a mesh, from this rank's shards and without a copy.

    The returned function adds the step's packed inputs (this rank's part, on the device) and the current cache.
    `expert_to_slot` is `[moe layers, experts]`, `tp_peers` the positions of its group's members in the mesh."""
    weights = live.weights
    assert weights is not None, "the rank does not attend"
    mesh = programs.mesh
    spec = steps.partition(live.shape.step(live.shape.buckets[0], mesh.size, programs.slots))
    local = replace_experts(weights, lambda position, _: live.experts[position])
    params = jax.tree.map(lambda s, a: global_array(mesh, s, a), spec.params, local)
    device = mesh.local_devices[0]
    routes = global_array(mesh, spec.expert_to_slot, jax.device_put(expert_to_slot[None].astype(np.int32), device))
    group, tensor = None, live.shape.cfg.tensor
    if tensor > 1:
        members = np.array([tp_peers or (-1,) * tensor], np.int32)
        group = global_array(mesh, spec.tp_peers, jax.device_put(members, device))

    def arguments(packed: jax.Array) -> steps.StepArguments:
        return steps.StepArguments(
            params=params,
            cache=jax.tree.map(lambda a: global_array(mesh, steps.SHARDED_AXIS_1, a), live.cache),
            expert_to_slot=routes,
            packed=global_array(mesh, spec.packed, packed),
            tp_peers=group,
        )

    return arguments


def local_arguments(
    live: LiveArrays, expert_to_slot: np.ndarray, device: JaxDevice
) -> Callable[[jax.Array], steps.RoleArguments]:
    """The arguments of a step of an attention rank or an expert rank, as `mesh_arguments` makes them."""
    routes = jax.device_put(expert_to_slot.astype(np.int32), device)
    common = None if live.weights is None else map_experts(live.weights, lambda _: None)

    def arguments(packed: jax.Array) -> steps.RoleArguments:
        if common is None:
            return steps.RoleArguments(params=None, cache=None, routes=None, experts=live.experts, packed=None)
        return steps.RoleArguments(params=common, cache=live.cache, routes=routes, experts=None, packed=packed)

    return arguments
