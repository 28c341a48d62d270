"""Attention ranks and expert ranks: what each of them computes between two exchanges.

A step goes from one MoE layer to the next, so its programs are cut there and run by the host, one after the other
(`moejax.model.stages`): a rank holds the weights of its own role alone, which one program over all ranks could not
have. The exchange is the only program that has a collective in it. Rows do not depend on their batch
(docs/decisions/0001), so the tokens are those of collocated ranks in every bit.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float, Int, Shaped

from moejax.config.axes import ArrayLike
from moejax.config.kv_cache import KVCache
from moejax.config.model_config import LayerKind
from moejax.config.params import FeedForward, Params, first_layer
from moejax.config.step_inputs import StepInputs
from moejax.config.weight_formats import slice_stacks
from moejax.model.decoder import (
    StepContext,
    StepOutputs,
    attend,
    embed,
    is_finite,
    last_norm,
    layer_at,
    rows_needed,
    tag_nonfinite,
)
from moejax.model.exchange import gated_sum, pack_outbox, unpack_inbox
from moejax.model.experts import apply_experts
from moejax.model.feed_forward import LayerEnd, add_expert_outputs, feed_forward, route_tokens, shared_expert
from moejax.model.stages import MicroBatch, RolesShape, Stage


@struct.dataclass
class PendingMicroBatch:
    """A micro-batch whose rows are with the experts. Leaves are arrays or shapes."""

    x: Any
    """Rows before the answers of their experts `[T, D]`."""
    shared_expert: Any
    """Outputs of the shared expert `[T, D]`, or None."""
    rank: Any
    """Expert rank of each answer `[T, X]`, -1 for none."""
    nth: Any
    """Which of the row's answers from that rank it is `[T, X]`."""
    gates: Any
    """Gate of each answer `[T, X]`."""
    end: LayerEnd
    """Norms and scale of the layer's output."""


@struct.dataclass
class StageInputs:
    """The inputs of a stage besides weights, cache and packed inputs. Leaves are arrays or shapes."""

    pending: PendingMicroBatch | None
    """The micro-batch that waits for answers; None in the first stage."""
    inbox: Any
    """Messages of all ranks `[n, part]`; None in the first stage."""
    other_kv: KVCache | None
    """`new_kv` of the other micro-batch if that came first."""
    repeat: Any
    """The repeat of its last segment at which the stage stands."""


@struct.dataclass
class StageOutputs:
    """The outputs of a stage: a pending micro-batch and its outbox, or in the last stage the hidden rows."""

    pending: Any
    outbox: Any
    """Messages to all ranks `[n, part]`."""
    hidden: Any
    """Rows after the last norm `[T, D]`."""
    new_kv: Any
    """New keys and values of its layers, among those of the whole step: KVCache of `[layers, R, width]`."""
    load: Any
    """Rows sent to each expert `[E]`."""


def attend_stage(
    params: Params,
    cache: KVCache,
    routes: Int[ArrayLike, "moe E"],
    inputs: StepInputs,
    stage_inputs: StageInputs,
    *,
    shape: RolesShape,
    stage: Stage,
    micro_batch: MicroBatch,
) -> StageOutputs:
    """One stage of one micro-batch on an attention rank. `inputs` are those of the whole step; expert leaves of
    `params` are None."""
    cfg, own = shape.step.cfg, shape.micro_batch_shape(micro_batch)
    rows, segments = shape.row_indices(micro_batch)
    part = _select_inputs(inputs, rows, segments)
    x = embed(params, part, cfg) if stage.after is None else _add_answers(stage_inputs, stage.after, shape, micro_batch)
    new_kv, routed, all_rows = [], None, shape.step.bucket.rows
    shared, exchange, end = None, None, None
    for n, place in enumerate(stage.layers):
        repeat = stage_inputs.repeat + place.repeat if place.relative else jnp.int32(place.repeat)
        depth = place.depth(cfg, repeat)
        layer = layer_at(params.segments[place.segment][place.position], repeat)
        other_kv = jax.tree.map(lambda a, n=n: a[n], stage_inputs.other_kv)
        context = StepContext(
            cache=cache, inputs=part, shape=own, merge_kv=functools.partial(_merge_kv, rows, all_rows, other_kv)
        )
        its = cfg.of_layer(first_layer(cfg, (place.segment, place.position)))
        x, kv = attend(x, layer, depth, context, its)
        new_kv.append(kv)
        wanted = rows_needed(part, depth, cfg)
        if layer.moe is None:
            x = feed_forward(x, layer, wanted, its)
        else:
            exchange = shape.exchange_of(place.kind(cfg))
            routed = route_tokens(x, layer, routes[place.moe_depth(cfg, repeat)], wanted, exchange, its)
            shared, end = shared_expert(routed.h, layer, place.kind(cfg), its), LayerEnd.of(layer)
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *new_kv) if new_kv else None
    if routed is None or exchange is None or end is None:
        return StageOutputs(pending=None, outbox=None, hidden=last_norm(x, params, cfg), new_kv=stacked, load=None)
    sent = pack_outbox(routed.sent, routed.slot, routed.rank, routed.nth, exchange)
    return StageOutputs(
        pending=PendingMicroBatch(
            x=x,
            shared_expert=shared,
            rank=routed.rank,
            nth=routed.nth,
            gates=routed.gates,
            end=end,
        ),
        outbox=_pad_outbox(sent, shape.attention, shape),
        hidden=None,
        new_kv=stacked,
        load=routed.load,
    )


def answer_rows(
    experts: FeedForward,
    inbox: Float[ArrayLike, "n part"],
    repeat: Int[ArrayLike, ""],
    *,
    shape: RolesShape,
    kind: LayerKind,
    micro_batch: MicroBatch,
) -> Float[ArrayLike, "n part"]:
    """The outbox of an expert rank: answers to the rows that it got.

    `experts` leaves are the slots `[R, P, ...]` of a segment's position, whose layers are of this kind; `shape` has the
    configuration as they see it.
    """
    cfg, exchange = shape.step.cfg, shape.exchange_of(kind)
    T, width = shape.micro_batches[micro_batch].rows, cfg.d_model + exchange.answers
    rows, wanted = unpack_inbox(inbox[: shape.attention, : T * width].reshape(-1, T, width), exchange)
    answers = apply_experts(rows, wanted, slice_stacks(experts, repeat), shape.step.slots, cfg.experts_of(kind))
    return _pad_outbox(answers.reshape(shape.attention, T, -1), 0, shape)


def gather_outputs(
    hidden: tuple[Any, ...],
    new_kv: tuple[KVCache, ...],
    loads: tuple[Any, ...],
    inputs: StepInputs,
    *,
    shape: RolesShape,
) -> StepOutputs:
    """A step's outputs from those of its stages: `hidden` of the last stage of each micro-batch, `new_kv` of the stages
    of the last micro-batch, and the loads of all."""
    cfg = shape.step.cfg
    hidden_RD = jnp.zeros((shape.step.bucket.rows, cfg.d_model), hidden[0].dtype)
    for micro_batch, rows_TD in enumerate(hidden):
        hidden_RD = hidden_RD.at[shape.row_indices(micro_batch)[0]].set(rows_TD)
    experts = cfg.moe.experts if cfg.moe else 0
    load_LE = jnp.stack(loads).reshape(cfg.n_moe_layers, len(shape.micro_batches), experts).sum(1)
    new = jax.tree.map(lambda *each: jnp.concatenate(each), *new_kv)
    return StepOutputs(
        hidden=tag_nonfinite(hidden_RD, is_finite(new, shape.step.bucket), inputs), new_kv=new, expert_load=load_LE
    )


def _select_inputs(inputs: StepInputs, rows: np.ndarray, segments: np.ndarray) -> StepInputs:
    """The inputs of some rows and segments; `new_base` counts the rows of the whole step."""
    by_row = ("tokens", "positions", "write", "read")
    fields = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    fields = {name: array for name, array in fields.items() if array is not None}
    return StepInputs(**{name: array[rows if name in by_row else segments] for name, array in fields.items()})


def _merge_kv(
    rows: np.ndarray,
    count: int,
    other_kv: KVCache | None,
    new: KVCache,
) -> KVCache:
    """A micro-batch's keys and values `[T, width]` among those of the whole step, which has `count` rows."""
    if other_kv is None:
        other_kv = jax.tree.map(lambda part: jnp.zeros((count, *part.shape[1:]), part.dtype), new)
    return jax.tree.map(lambda whole, part: whole.at[rows].set(part), other_kv, new)


def _add_answers(
    stage_inputs: StageInputs, after: LayerKind, shape: RolesShape, micro_batch: MicroBatch
) -> Float[ArrayLike, "T D"]:
    """Rows of the pending micro-batch plus the answers in the inbox and those of the shared expert."""
    pending = stage_inputs.pending
    assert pending is not None
    cfg, exchange = shape.step.cfg, shape.exchange_of(after)
    T = shape.micro_batches[micro_batch].rows
    size = T * exchange.answers * cfg.d_model
    back = stage_inputs.inbox[shape.attention :, :size].reshape(-1, T, exchange.answers, cfg.d_model)
    experts_TD = gated_sum(back, pending.rank, pending.nth, pending.gates)
    return add_expert_outputs(pending.x, experts_TD, pending.shared_expert, pending.end, cfg)


def _pad_outbox(parts_m: Shaped[ArrayLike, "m ..."], first: int, shape: RolesShape) -> Float[ArrayLike, "n part"]:
    """An outbox with these parts for the ranks from `first` on, zero elsewhere."""
    flat = parts_m.reshape(len(parts_m), -1)
    after = shape.step.ranks - first - len(flat)
    return jnp.pad(flat, ((first, after), (0, shape.part - flat.shape[1])))
