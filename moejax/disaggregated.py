"""Attention ranks and expert ranks: what each of them computes between two exchanges.

    attention  | embed, attend, route | mix, attend, route | ... | mix, last norm
    exchange          rows -> <- answers    rows ->
    expert     |                      | experts            | ...

A step goes from one MoE layer to the next, so its programs are cut there and run by the host, one after the other: a
rank holds the weights of its own role alone, which one program over all ranks could not have. The exchange is the only
program that has a collective in it.

Large steps are cut into two micro-batches in counter-phase: while attention ranks work on one, expert ranks work on the
other, and each exchange takes rows of the one to the experts and brings answers of the other back. Rows do not depend
on their batch (docs/decisions/0001), so the tokens are those of collocated ranks in every bit.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float, Int

from moejax.axes import Numbers
from moejax.cache import Cache
from moejax.config import LayerKind, ModelConfig, in_slots
from moejax.exchange import Exchange, gated_sum, incoming, outgoing
from moejax.experts import apply_experts
from moejax.inputs import TILE, Bucket, StepInputs
from moejax.layers import Stacked
from moejax.model import (
    StepOutputs,
    StepShape,
    always,
    answered,
    attend,
    choose,
    embed,
    feed_forward,
    is_sound,
    last_norm,
    layer_at,
    marked,
    mix,
)
from moejax.params import FeedForward, Params
from moejax.precision import Int8

WORTH_CUTTING = 32
"""Rows of a step below which two micro-batches cost more than they overlap: each reads all weights."""

Micro = int
"""Which of a step's micro-batches: 0 or 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolesShape:
    """Everything static about a step of attention ranks and expert ranks. They stand in this order in the mesh;
    `step.ranks` is all of them."""

    step: StepShape
    attention: int

    @property
    def experts(self) -> int:
        """Ranks that hold experts."""
        return self.step.ranks - self.attention

    def exchange_of(self, kind: LayerKind) -> Exchange:
        """Sizes of what goes to the expert ranks for a layer of this kind."""
        return dataclasses.replace(self.step.exchange_of(kind), ranks=self.experts)

    @functools.cached_property
    def micros(self) -> tuple[Bucket, ...]:
        """The micro-batches of the step: one, or two halves where both have rows."""
        whole = self.step.bucket
        if whole.rows < WORTH_CUTTING:
            return (whole,)
        later = dataclasses.replace(whole, decode=whole.decode // 2, tiles=whole.tiles // 2)
        if not later.rows:
            return (whole,)
        return dataclasses.replace(whole, decode=whole.decode - later.decode, tiles=whole.tiles - later.tiles), later

    @property
    def part(self) -> int:
        """Numbers that a rank sends to one other in an exchange: rows and what they want, or answers."""
        answers, width = self.step.exchange.answers, self.step.cfg.d_model
        return max(micro.rows for micro in self.micros) * max(width + answers, width * answers)

    @property
    def outbox_bytes(self) -> int:
        """The most a rank sends at once."""
        return 4 * self.step.ranks * self.part

    @property
    def turns(self) -> int:
        """Turns of a step. Attention ranks work on micro-batch `turn % 2` and MoE layer `turn // 2`, expert ranks on
        what was sent to them in the turn before; between two turns is an exchange."""
        return 2 * self.step.cfg.n_moe_layers + len(self.micros)

    def of_micro(self, micro: Micro) -> StepShape:
        """The shape of the rows of one micro-batch."""
        return dataclasses.replace(self.step, bucket=self.micros[micro])

    def places(self, micro: Micro) -> tuple[np.ndarray, np.ndarray]:
        """Rows and segments of the step that are those of a micro-batch, in its own order."""
        whole, (first, *_) = self.step.bucket, self.micros
        size = self.micros[micro]
        decode = np.arange(size.decode) + (first.decode if micro else 0)
        tiles = np.arange(size.tiles) + (first.tiles if micro else 0)
        rows = whole.decode + TILE * tiles[:, None] + np.arange(TILE)
        return np.concatenate([decode, rows.reshape(-1)]), np.concatenate([decode, whole.decode + tiles])


@dataclasses.dataclass(frozen=True)
class Place:
    """A layer: its segment, its position in the pattern, and its repeat; counted from the repeat of the stretch's last
    layer if `moves`."""

    segment: int
    position: int
    repeat: int
    moves: bool


@dataclasses.dataclass(frozen=True)
class Stretch:
    """The layers that attention ranks compute between two exchanges. Those of one value are one program; which repeat
    of its last segment it stands at, is an argument. It begins with the answers to a layer of kind `after`, the first
    with the tokens; `last` ends with the last norm, all others with the routing of their last layer."""

    layers: tuple[Place, ...]
    after: LayerKind | None
    last: bool


def stretches(cfg: ModelConfig) -> tuple[tuple[Stretch, int], ...]:
    """The stretches of a step, one more than there are MoE layers, and the repeat that each stands at."""
    found: list[tuple[Stretch, int]] = []
    layers: list[tuple[int, int, int]] = []
    after: LayerKind | None = None
    for i, (pattern, repeats) in enumerate(cfg.segments):
        for r in range(repeats):
            for j, kind in enumerate(pattern):
                layers.append((i, j, r))
                if in_slots(kind):
                    places = (Place(a, b, c - r if a == i else c, a == i) for a, b, c in layers)
                    found.append((Stretch(tuple(places), after, False), r))
                    layers, after = [], kind
    rest = tuple(Place(a, b, c, False) for a, b, c in layers)
    return (*found, (Stretch(rest, after, True), 0))


@struct.dataclass
class Pending:
    """A micro-batch whose rows are with the experts: `x [T, D]` before their answers, what the always-on expert
    answered `[T, D]` or None, and where each answer will be `[T, X]`, with its gate."""

    x: Any
    always: Any
    rank: Any
    nth: Any
    gates: Any


@struct.dataclass
class Attended:
    """What a stretch makes: the pending micro-batch and what to send `[n, part]`, or the rows after the last norm;
    new keys and values of its layers among those of the whole step `[layers, R, width]`, and the rows sent to each
    expert `[E]`."""

    pending: Any
    outbox: Any
    hidden: Any
    new_kv: Any
    load: Any


def attend_stretch(
    params: Params,
    cache: Cache,
    routes: Int[Numbers, "moe E"],
    inputs: StepInputs,
    pending: Pending | None,
    inbox: Float[Numbers, "n part"] | None,
    before: Cache | None,
    repeat: Int[Numbers, ""],
    *,
    shape: RolesShape,
    stretch: Stretch,
    micro: Micro,
) -> Attended:
    """One stretch of one micro-batch on an attention rank. `inputs` are those of the whole step; `before` is the
    `new_kv` of the other micro-batch if that came first; expert leaves of `params` are None."""
    cfg, own = shape.step.cfg, shape.of_micro(micro)
    rows, segments = shape.places(micro)
    part = _part_of(inputs, rows, segments)
    x = embed(params, part, cfg) if stretch.after is None else _mixed(pending, inbox, stretch.after, shape, micro)
    new_kv, chosen, all_rows = [], None, shape.step.bucket.rows
    always_on, exchange = None, None
    for n, place in enumerate(stretch.layers):
        at = repeat + place.repeat if place.moves else jnp.int32(place.repeat)
        layer = layer_at(params.segments[place.segment][place.position], at)
        among = functools.partial(_among, rows, all_rows, jax.tree.map(lambda a, n=n: a[n], before))
        x, kv = attend(x, layer, cache, _depth(cfg, place, at), part, own, among)
        new_kv.append(kv)
        wanted = answered(part, _depth(cfg, place, at), cfg)
        if layer.moe is None:
            x = feed_forward(x, layer, wanted, cfg)
        else:
            exchange = shape.exchange_of(cfg.segments[place.segment][0][place.position])
            chosen = choose(x, layer, routes[_moe_depth(cfg, place, at)], wanted, exchange, cfg)
            always_on = always(chosen.h, layer)
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *new_kv) if new_kv else None
    if chosen is None or exchange is None:
        return Attended(pending=None, outbox=None, hidden=last_norm(x, params, cfg), new_kv=stacked, load=None)
    sent = outgoing(chosen.h, chosen.slot, chosen.rank, chosen.nth, exchange)
    return Attended(
        pending=Pending(x=x, always=always_on, rank=chosen.rank, nth=chosen.nth, gates=chosen.gates),
        outbox=_boxed(sent, shape.attention, 0, shape.part),
        hidden=None,
        new_kv=stacked,
        load=chosen.load,
    )


def answer(
    experts: FeedForward,
    inbox: Float[Numbers, "n part"],
    repeat: Int[Numbers, ""],
    *,
    shape: RolesShape,
    kind: LayerKind,
    micro: Micro,
) -> Float[Numbers, "n part"]:
    """What an expert rank sends back for the rows it got. `experts` leaves are the slots `[R, S, ...]` of a segment's
    position, whose layers are of this kind."""
    cfg, exchange = shape.step.cfg, shape.exchange_of(kind)
    T, width = shape.micros[micro].rows, cfg.d_model + exchange.answers
    rows, wanted = incoming(inbox[: shape.attention, : T * width].reshape(-1, T, width), exchange)
    is_int8 = lambda leaf: isinstance(leaf, Int8)  # noqa: E731
    layer = jax.tree.map(lambda leaf: Stacked(leaf, (repeat,)), experts, is_leaf=is_int8)
    answers = apply_experts(rows, wanted, layer, shape.step.slots, cfg.experts_of(kind))
    return _boxed(answers.reshape(shape.attention, T, -1), 0, shape.experts, shape.part)


def gather(
    hidden: tuple[Any, ...],
    new_kv: tuple[Cache, ...],
    loads: tuple[Any, ...],
    inputs: StepInputs,
    *,
    shape: RolesShape,
) -> StepOutputs:
    """A step's outputs from those of its stretches: the last of each micro-batch, `new_kv` of the last micro-batch, and
    the loads of all."""
    cfg = shape.step.cfg
    whole = jnp.zeros((shape.step.bucket.rows, cfg.d_model), hidden[0].dtype)
    for micro, rows in enumerate(hidden):
        whole = whole.at[shape.places(micro)[0]].set(rows)
    moe = cfg.moe.experts if cfg.moe else 0
    by_layer = jnp.stack(loads).reshape(cfg.n_moe_layers, len(shape.micros), moe).sum(1)
    new = jax.tree.map(lambda *each: jnp.concatenate(each), *new_kv)
    return StepOutputs(hidden=marked(whole, is_sound(new), inputs), new_kv=new, expert_load=by_layer)


def _part_of(inputs: StepInputs, rows: np.ndarray, segments: np.ndarray) -> StepInputs:
    """The inputs of some rows and segments; `new_base` counts the rows of the whole step."""
    by_row = ("tokens", "positions", "write", "read")
    fields = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    return StepInputs(**{name: array[rows if name in by_row else segments] for name, array in fields.items()})


def _among(rows: np.ndarray, count: int, before: Cache | None, k: jax.Array, v: jax.Array) -> tuple[Any, Any]:
    """A micro-batch's keys and values `[T, K, H]` among those of the whole step `[R, K, H]`."""

    def put(old: Any, new: jax.Array) -> jax.Array:
        whole = jnp.zeros((count, *new.shape[1:]), new.dtype) if old is None else old.reshape(count, *new.shape[1:])
        return whole.at[rows].set(new)

    return put(before.k if before else None, k), put(before.v if before else None, v)


def _mixed(pending: Pending | None, inbox: Any, after: LayerKind, shape: RolesShape, micro: Micro) -> jax.Array:
    assert pending is not None
    cfg, exchange = shape.step.cfg, shape.exchange_of(after)
    T = shape.micros[micro].rows
    size = T * exchange.answers * cfg.d_model
    back = inbox[shape.attention :, :size].reshape(-1, T, exchange.answers, cfg.d_model)
    return mix(pending.x, gated_sum(back, pending.rank, pending.nth, pending.gates), pending.always, cfg)


def _boxed(parts: jax.Array, before: int, after: int, size: int) -> jax.Array:
    """Parts `[m, ...]` as rows of an outbox `[before + m + after, size]`, zero elsewhere."""
    flat = parts.reshape(len(parts), -1)
    return jnp.pad(flat, ((before, after), (0, size - flat.shape[1])))


def _depth(cfg: ModelConfig, place: Place, repeat: jax.Array) -> jax.Array:
    """Number of a layer among all."""
    before = sum(len(pattern) * repeats for pattern, repeats in cfg.segments[: place.segment])
    return before + repeat * len(cfg.segments[place.segment][0]) + place.position


def _moe_depth(cfg: ModelConfig, place: Place, repeat: jax.Array) -> jax.Array:
    """Number of a layer among those with experts."""
    count = lambda kinds: sum(map(in_slots, kinds))  # noqa: E731
    before = sum(count(pattern) * repeats for pattern, repeats in cfg.segments[: place.segment])
    pattern = cfg.segments[place.segment][0]
    return before + repeat * count(pattern) + count(pattern[: place.position])
