"""Every `jax.jit` of a rank, made at import. The docstrings say which arguments are donated."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Int

from moejax.config.axes import RANKS, ArrayLike
from moejax.config.kv_cache import KVCache, cache_shapes, commit
from moejax.config.model_config import LayerKind
from moejax.config.params import FeedForward, Head, is_spec, map_experts, param_specs, replace_experts
from moejax.config.step_inputs import Bucket, packed_size, unpack
from moejax.config.weight_formats import slot_shapes, weight_shape
from moejax.model import decoder
from moejax.model.decoder import StepOutputs
from moejax.model.disaggregated import StageInputs, StageOutputs, answer_rows, attend_stage, gather_outputs
from moejax.model.exchange import Exchange, all_to_all
from moejax.model.logits import LogitsAdjustments, head_logits
from moejax.model.mtp import DraftOutputs, draft
from moejax.model.sampling import sample, sample_adjusted, score
from moejax.model.stages import RolesShape, Stage
from moejax.model.step_shape import StepShape
from moejax.model.tensor_parallel import gather_group
from moejax.ops import cpu
from planner.plan.step_layout import TILE

REPLICATED = PartitionSpec()
SHARDED = PartitionSpec(RANKS)
SHARDED_AXIS_1 = PartitionSpec(None, RANKS)


@struct.dataclass
class StepArguments:
    """The arguments of a step; none of them is donated. Leaves are arrays, partition specs or shapes."""

    params: Any
    cache: Any
    expert_to_slot: Any
    packed: Any
    tp_peers: Any = None
    """Positions in the mesh of the members of this rank's tensor group `[1, members]`; None where heads are not
    sharded."""


@struct.dataclass
class RoleArguments:
    """The arguments of a step on an attention rank or an expert rank, on its own device. An attention rank has `params`
    without experts, the cache, `routes [moe layers, E]` and `packed`; an expert rank `experts`, the slots of each
    (segment, position)."""

    params: Any
    cache: Any
    routes: Any
    experts: Any
    packed: Any


def partition(shape: StepShape) -> StepArguments:
    """The partition spec of each argument of a step."""
    params = jax.tree.map(
        lambda spec: jax.tree.map(lambda _: REPLICATED, weight_shape(shape.cfg, spec)),
        param_specs(shape.cfg),
        is_leaf=is_spec,
    )
    return StepArguments(
        params=map_experts(params, lambda _: SHARDED_AXIS_1),
        cache=_cache_partition(shape),
        expert_to_slot=PartitionSpec(RANKS),
        packed=PartitionSpec(RANKS),
        tp_peers=PartitionSpec(RANKS) if shape.cfg.tensor > 1 else None,
    )


def _cache_partition(shape: StepShape) -> KVCache:
    """The partition specs of a cache, and of what a step writes to it."""
    return jax.tree.map(lambda _: SHARDED_AXIS_1, cache_shapes(shape.cfg, 1, 1))


def local_shapes(shape: StepShape, entries: int, states: int = 0) -> StepArguments:
    """The shape of one rank's shard of each argument of a step, with a cache of so many entries and states."""
    cfg = shape.cfg
    params = jax.tree.map(lambda spec: weight_shape(cfg, spec), param_specs(cfg), is_leaf=is_spec)
    experts = cfg.moe.experts if cfg.moe else 0
    return StepArguments(
        params=replace_experts(params, lambda position, _: slot_shapes(cfg, position, shape.slots)),
        cache=cache_shapes(cfg, entries, states),
        expert_to_slot=jax.ShapeDtypeStruct((1, cfg.n_moe_layers, experts), jnp.int32),
        packed=jax.ShapeDtypeStruct((packed_size(shape.bucket),), jnp.int32),
        tp_peers=jax.ShapeDtypeStruct((1, cfg.tensor), jnp.int32) if cfg.tensor > 1 else None,
    )


@functools.partial(jax.jit, static_argnames=("shape", "mesh"))
def run_step(arguments: StepArguments, *, shape: StepShape, mesh: Mesh) -> StepOutputs:
    """One step over `mesh`: contains the collectives, reads everything, donates nothing."""

    in_groups = shape.cfg.tensor > 1

    def local(a: StepArguments) -> StepOutputs:
        group = gather_group(a.packed, a.tp_peers[0], shape.bucket, shape.exchange) if in_groups else None
        return decoder.step(a.params, a.cache, a.expert_to_slot[0], unpack(a.packed, shape.bucket), shape, group)

    outputs = StepOutputs(
        hidden=PartitionSpec(RANKS),
        new_kv=_cache_partition(shape),
        expert_load=PartitionSpec(RANKS),
        group_inputs=PartitionSpec(RANKS) if in_groups else None,
    )
    return jax.shard_map(local, mesh=mesh, in_specs=(partition(shape),), out_specs=outputs, check_vma=False)(arguments)


@functools.partial(jax.jit, static_argnames=("shape", "mesh", "drafts"))
def run_draft(
    arguments: StepArguments,
    outputs: StepOutputs,
    tokens: Int[ArrayLike, " nZ"],
    *,
    shape: StepShape,
    mesh: Mesh,
    drafts: int,
) -> DraftOutputs:
    """The drafts after a step with these outputs and sampled `tokens`, over `mesh`; see `mtp.draft`. Contains
    collectives, reads everything, donates nothing."""

    def local(a: StepArguments, step: StepOutputs, sampled_Z: Int[ArrayLike, " Z"]) -> DraftOutputs:
        inputs = unpack(a.packed, shape.bucket)
        return draft(a.params, a.cache, a.expert_to_slot[0], inputs, step, sampled_Z, shape, drafts)

    kv = _cache_partition(shape)
    specs = (
        partition(shape),
        StepOutputs(hidden=SHARDED, new_kv=kv, expert_load=SHARDED, group_inputs=None),
        SHARDED,
    )
    after = DraftOutputs(drafts=SHARDED, new_kv=kv, expert_load=SHARDED)
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=after, check_vma=False)
    return run(arguments, outputs, tokens)


def draft_shapes(shape: StepShape) -> StepOutputs:
    """The shape of one rank's shard of the outputs that `run_draft` takes."""
    cfg = shape.cfg
    return StepOutputs(
        hidden=jax.ShapeDtypeStruct((shape.bucket.rows, cfg.d_model), jnp.float32),
        new_kv=cache_shapes(cfg, shape.bucket.rows),
        expert_load=jax.ShapeDtypeStruct((cfg.n_moe_layers, cfg.moe.experts if cfg.moe else 0), jnp.int32),
    )


@functools.partial(jax.jit, static_argnames=("bucket",))
def run_sample(
    head: Head, hidden_RD: Float[ArrayLike, "R D"], packed: Int[ArrayLike, " packed"], *, bucket: Bucket
) -> tuple[Int[jax.Array, " Z"], Float[jax.Array, " Z"]]:
    """Next tokens `[Z]` of a step's segments and their log-probabilities `[Z]`, from this rank's own rows."""
    inputs = unpack(packed, bucket)
    return sample(head_logits(head, hidden_RD[inputs.sample_row]), inputs)


@functools.partial(jax.jit, static_argnames=("bucket",))
def run_sample_adjusted(
    head: Head,
    hidden_RD: Float[ArrayLike, "R D"],
    packed: Int[ArrayLike, " packed"],
    adjustments: LogitsAdjustments,
    *,
    bucket: Bucket,
) -> tuple[Int[jax.Array, " Z"], Float[jax.Array, " Z"], Int[jax.Array, "Z top"], Float[jax.Array, "Z top"]]:
    """`run_sample` with logits adjustments, and the likeliest tokens: for steps that ask for either."""
    inputs = unpack(packed, bucket)
    return sample_adjusted(head_logits(head, hidden_RD[inputs.sample_row]), inputs, adjustments)


@jax.jit
def run_score(
    head: Head, hidden_RD: Float[ArrayLike, "R D"], first_row: Int[ArrayLike, ""], targets: Int[ArrayLike, " tile"]
) -> tuple[Float[jax.Array, " tile"], Int[jax.Array, "tile top"], Float[jax.Array, "tile top"]]:
    """Log-probabilities of given tokens after the rows of one tile, and the likeliest tokens in their place; see
    `sampling.score`."""
    tile = jax.lax.dynamic_slice_in_dim(hidden_RD, first_row, TILE)
    return score(head_logits(head, tile), targets)


@functools.partial(jax.jit, static_argnames=("bucket",), donate_argnames=("cache",))
def run_commit(cache: KVCache, new_kv: KVCache, packed: Int[ArrayLike, " packed"], *, bucket: Bucket) -> KVCache:
    """Write a finished step into this rank's own cache. Donates it; no collective, so it cannot fail half-way.
    `packed` has the inputs of one step, or those of each member of a tensor group, whose entries lie in its own part of
    the cache."""
    members = [unpack(each, bucket) for each in packed.reshape(-1, packed_size(bucket))]
    entries = cache.entries // len(members)
    write = [inputs.write + t * entries for t, inputs in enumerate(members)]
    return commit(cache, new_kv, jnp.concatenate(write), members[0].state_write)


@functools.partial(jax.jit, donate_argnames=("experts",))
def run_fill(
    experts: FeedForward, one: FeedForward, repeat: Int[ArrayLike, ""], slot: Int[ArrayLike, ""]
) -> FeedForward:
    """Put one expert's weights (`[2F, D]`, `[D, F]` ...) into a slot of a segment's leaves. Donates the leaves."""
    return jax.tree.map(lambda leaf, weight: leaf.at[repeat, slot].set(weight), experts, one)


@functools.partial(jax.jit, static_argnames=("mesh", "exchange"))
def run_connect(x_nn: Float[ArrayLike, "n n"], *, mesh: Mesh, exchange: Exchange) -> Float[jax.Array, "n n"]:
    """The smallest exchange there is, `[n, n]`: running it connects the communicator of a mesh."""
    spec = PartitionSpec(RANKS)

    def local(row):
        return all_to_all(row.reshape(-1, 1), exchange).reshape(row.shape)

    return jax.shard_map(local, mesh=mesh, in_specs=(spec,), out_specs=spec)(x_nn)


@functools.partial(jax.jit, static_argnames=("shape", "stage", "micro_batch"))
def run_stage(
    own: RoleArguments, stage_inputs: StageInputs, *, shape: RolesShape, stage: Stage, micro_batch: int
) -> StageOutputs:
    """A stage of an attention rank; see `disaggregated.attend_stage`. Donates nothing."""
    inputs = unpack(own.packed, shape.step.bucket)
    return attend_stage(
        own.params, own.cache, own.routes, inputs, stage_inputs, shape=shape, stage=stage, micro_batch=micro_batch
    )


@functools.partial(jax.jit, static_argnames=("shape", "kind", "micro_batch"))
def run_answer_rows(
    experts: FeedForward,
    inbox: Float[ArrayLike, "n part"],
    repeat: Int[ArrayLike, ""],
    *,
    shape: RolesShape,
    kind: LayerKind,
    micro_batch: int,
) -> Float[jax.Array, "n part"]:
    """The answers of an expert rank; see `disaggregated.answer_rows`."""
    return answer_rows(experts, inbox, repeat, shape=shape, kind=kind, micro_batch=micro_batch)


@functools.partial(jax.jit, static_argnames=("shape",))
def run_gather(
    hidden: tuple[Any, ...],
    new_kv: tuple[KVCache, ...],
    loads: tuple[Any, ...],
    packed: Int[ArrayLike, " packed"],
    *,
    shape: RolesShape,
) -> StepOutputs:
    """A step's outputs from those of an attention rank's stages."""
    return gather_outputs(hidden, new_kv, loads, unpack(packed, shape.step.bucket), shape=shape)


@functools.partial(jax.jit, static_argnames=("mesh",))
def run_exchange(boxes: Float[ArrayLike, "nn part"], *, mesh: Mesh) -> Float[jax.Array, "nn part"]:
    """Row i of each rank's outbox `[n, part]` to rank i of `mesh`: the collective between roles."""
    exchange = lambda box: jax.lax.all_to_all(box, RANKS, 0, 0, tiled=True)  # noqa: E731
    return jax.shard_map(exchange, mesh=mesh, in_specs=(SHARDED,), out_specs=SHARDED)(boxes)


@jax.jit
def run_local_exchange(outbox: Float[ArrayLike, "n part"]) -> Float[jax.Array, "n part"]:
    """`run_exchange` between ranks that share memory: a program of one device."""
    return cpu.exchange(outbox)
