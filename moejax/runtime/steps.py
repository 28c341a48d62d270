"""Every `jax.jit` of a rank, made at import. What is donated is stated here."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from moejax import kernels, model
from moejax.axes import RANKS
from moejax.cache import Cache, cache_shapes, commit
from moejax.config import LayerKind
from moejax.disaggregated import Attended, Pending, RolesShape, Stretch, answer, attend_stretch, gather
from moejax.exchange import Exchange, all_to_all
from moejax.inputs import TILE, Bucket, packed_size, unpack
from moejax.layers import row_dot
from moejax.model import StepOutputs, StepShape
from moejax.params import FeedForward, Head, Layer, Params, is_spec, param_specs
from moejax.precision import held_shape
from moejax.sampling import sample, sample_shaped, score
from moejax.shaping import Shaping
from moejax.tensor import meet

WHOLE = PartitionSpec()
IN_TURN = PartitionSpec(RANKS)
SLOTS = PartitionSpec(None, RANKS)


@struct.dataclass
class StepArguments:
    """What a step reads; none of it is donated. Leaves are arrays, specs or shapes alike."""

    params: Any
    cache: Any
    expert_to_slot: Any
    packed: Any
    mates: Any = None
    """Who is in this rank's tensor group (`tensor.Group`) `[1, T]`, if heads are divided."""


@struct.dataclass
class RoleArguments:
    """What a step reads on a rank of one role, on its own device. An attention rank has `params` without experts, the
    cache, `routes [moe layers, E]` and `packed`; an expert rank `experts`, the slots of each (segment, position)."""

    params: Any
    cache: Any
    routes: Any
    experts: Any
    packed: Any


def partition(shape: StepShape) -> StepArguments:
    """How each argument of a step lies on the mesh."""
    params = jax.tree.map(
        lambda spec: jax.tree.map(lambda _: WHOLE, held_shape(shape.cfg, spec)), param_specs(shape.cfg), is_leaf=is_spec
    )
    return StepArguments(
        params=with_experts(params, lambda _: SLOTS),
        cache=Cache(k=SLOTS, v=SLOTS),
        expert_to_slot=PartitionSpec(RANKS),
        packed=PartitionSpec(RANKS),
        mates=PartitionSpec(RANKS) if shape.cfg.tensor > 1 else None,
    )


def local_shapes(shape: StepShape, entries: int) -> StepArguments:
    """Shapes of one rank's shard of each argument."""
    cfg = shape.cfg
    params = jax.tree.map(lambda spec: held_shape(cfg, spec), param_specs(cfg), is_leaf=is_spec)
    slots = lambda s: jax.ShapeDtypeStruct((s.shape[0], shape.slots, *s.shape[2:]), s.dtype)  # noqa: E731
    sizes = cache_shapes(cfg, entries)
    experts = cfg.moe.experts if cfg.moe else 0
    return StepArguments(
        params=with_experts(params, slots),
        cache=Cache(k=jax.ShapeDtypeStruct(sizes.k, jnp.float32), v=jax.ShapeDtypeStruct(sizes.v, jnp.float32)),
        expert_to_slot=jax.ShapeDtypeStruct((1, cfg.n_moe_layers, experts), jnp.int32),
        packed=jax.ShapeDtypeStruct((packed_size(shape.bucket),), jnp.int32),
        mates=jax.ShapeDtypeStruct((1, cfg.tensor), jnp.int32) if cfg.tensor > 1 else None,
    )


def with_experts(params: Params, change) -> Params:
    def layer(each: Layer) -> Layer:
        if each.moe is None:
            return each
        return each.replace(moe=each.moe.replace(experts=jax.tree.map(change, each.moe.experts)))

    return params.replace(segments=tuple(tuple(layer(each) for each in segment) for segment in params.segments))


@functools.partial(jax.jit, static_argnames=("shape", "mesh"))
def run_step(arguments: StepArguments, *, shape: StepShape, mesh: Mesh) -> StepOutputs:
    """One step over `mesh`: contains the collectives, reads everything, donates nothing."""

    divided = shape.cfg.tensor > 1

    def local(a: StepArguments) -> StepOutputs:
        group = meet(a.packed, a.mates[0], shape.bucket, shape.exchange) if divided else None
        return model.step(a.params, a.cache, a.expert_to_slot[0], unpack(a.packed, shape.bucket), shape, group)

    outputs = StepOutputs(
        hidden=PartitionSpec(RANKS),
        new_kv=Cache(k=SLOTS, v=SLOTS),
        expert_load=PartitionSpec(RANKS),
        written=PartitionSpec(RANKS) if divided else None,
    )
    return jax.shard_map(local, mesh=mesh, in_specs=(partition(shape),), out_specs=outputs, check_vma=False)(arguments)


def _logits(head: Head, hidden_TD: jax.Array) -> jax.Array:
    logits_TV = row_dot(hidden_TD, head.weight)
    return logits_TV if head.bias is None else logits_TV + head.bias


@functools.partial(jax.jit, static_argnames=("bucket",))
def run_sample(head: Head, hidden_RD: jax.Array, packed: jax.Array, *, bucket: Bucket) -> tuple[jax.Array, jax.Array]:
    """Next tokens `[Z]` of a step's segments and their log-probabilities `[Z]`, from this rank's own rows."""
    inputs = unpack(packed, bucket)
    return sample(_logits(head, hidden_RD[inputs.sample_row]), inputs)


@functools.partial(jax.jit, static_argnames=("bucket",))
def run_sample_shaped(
    head: Head, hidden_RD: jax.Array, packed: jax.Array, shaping: Shaping, *, bucket: Bucket
) -> tuple[jax.Array, ...]:
    """As `run_sample`, with penalties, biases and masks, and the likeliest tokens; for steps that ask for them."""
    inputs = unpack(packed, bucket)
    return sample_shaped(_logits(head, hidden_RD[inputs.sample_row]), inputs, shaping)


@jax.jit
def run_score(head: Head, hidden_RD: jax.Array, first_row: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
    """Log-probabilities of given tokens after the rows of one tile, and the likeliest instead; see `sampling.score`."""
    tile = jax.lax.dynamic_slice_in_dim(hidden_RD, first_row, TILE)
    return score(_logits(head, tile), targets)


@functools.partial(jax.jit, static_argnames=("bucket",), donate_argnames=("cache",))
def run_commit(cache: Cache, new_kv: Cache, packed: jax.Array, *, bucket: Bucket) -> Cache:
    """Write a finished step into this rank's own cache. Donates it; no collective, so it cannot fail half-way.
    `packed` has the inputs of one step, or those of each member of a tensor group, whose entries lie in its own part of
    the cache."""
    members = packed.reshape(-1, packed_size(bucket))
    entries = cache.k.shape[1] // len(members)
    write = [unpack(each, bucket).write + t * entries for t, each in enumerate(members)]
    return commit(cache, new_kv, jnp.concatenate(write))


@functools.partial(jax.jit, donate_argnames=("experts",))
def run_fill(experts: FeedForward, one: FeedForward, repeat: jax.Array, slot: jax.Array) -> FeedForward:
    """Put one expert's weights (`[2F, D]`, `[D, F]` ...) into a slot of a segment's leaves. Donates the leaves."""
    return jax.tree.map(lambda leaf, weight: leaf.at[repeat, slot].set(weight), experts, one)


@functools.partial(jax.jit, static_argnames=("mesh", "exchange"))
def run_connect(x: jax.Array, *, mesh: Mesh, exchange: Exchange) -> jax.Array:
    """The smallest exchange there is, `[n, n]`: running it connects the communicator of a mesh."""
    spec = PartitionSpec(RANKS)

    def local(row):
        return all_to_all(row.reshape(-1, 1), exchange).reshape(row.shape)

    return jax.shard_map(local, mesh=mesh, in_specs=(spec,), out_specs=spec)(x)


@functools.partial(jax.jit, static_argnames=("shape", "stretch", "micro"))
def run_stretch(
    own: RoleArguments,
    pending: Pending | None,
    inbox: jax.Array | None,
    before: Cache | None,
    repeat: jax.Array,
    *,
    shape: RolesShape,
    stretch: Stretch,
    micro: int,
) -> Attended:
    """What an attention rank does between two exchanges; see `disaggregated.attend_stretch`. Donates nothing."""
    inputs = unpack(own.packed, shape.step.bucket)
    return attend_stretch(
        own.params,
        own.cache,
        own.routes,
        inputs,
        pending,
        inbox,
        before,
        repeat,
        shape=shape,
        stretch=stretch,
        micro=micro,
    )


@functools.partial(jax.jit, static_argnames=("shape", "kind", "micro"))
def run_answer(
    experts: FeedForward, inbox: jax.Array, repeat: jax.Array, *, shape: RolesShape, kind: LayerKind, micro: int
) -> jax.Array:
    """What an expert rank does between two exchanges; see `disaggregated.answer`."""
    return answer(experts, inbox, repeat, shape=shape, kind=kind, micro=micro)


@functools.partial(jax.jit, static_argnames=("shape",))
def run_gather(
    hidden: tuple[Any, ...],
    new_kv: tuple[Cache, ...],
    loads: tuple[Any, ...],
    packed: jax.Array,
    *,
    shape: RolesShape,
) -> StepOutputs:
    """A step's outputs from those of an attention rank's stretches."""
    return gather(hidden, new_kv, loads, unpack(packed, shape.step.bucket), shape=shape)


@functools.partial(jax.jit, static_argnames=("mesh",))
def run_exchange(boxes: jax.Array, *, mesh: Mesh) -> jax.Array:
    """Row i of each rank's outbox `[n, part]` to rank i of `mesh`: the collective between roles."""
    exchange = lambda box: jax.lax.all_to_all(box, RANKS, 0, 0, tiled=True)  # noqa: E731
    return jax.shard_map(exchange, mesh=mesh, in_specs=(IN_TURN,), out_specs=IN_TURN)(boxes)


@jax.jit
def run_exchange_here(outbox: jax.Array) -> jax.Array:
    """The same between ranks that share memory: a program of one device."""
    return kernels.exchange(outbox)
