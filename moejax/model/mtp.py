"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): one more layer drafts the tokens after the next.

    h_i of the main model, token t_i+1 -> project [norm(embed(t_i+1)), norm(h_i)] -> layer -> norm -> head -> guess of
    t_i+2

It runs after a step that asks for it, over the same mesh, once the step has sampled: each row takes the token that
follows it, a token of the prompt or the one that was sampled there. Its keys and values are the last layer of the
cache, at the row's position; zeros where it did not run. Further guesses take the guess before for the token and the
layer's own normed output for the hidden state, as SGLang and TensorRT-LLM do, and write nothing: the next steps compute
these positions with the tokens that were sampled.

A guess may be wrong and changes no token (docs/decisions/0022). So entries of a prompt that a step cuts off, or that
other requests share, may be of another next token, and where the layer gives no number its entries are zeros.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool, Float, Int

from moejax.config.axes import ArrayLike
from moejax.config.kv_cache import KVCache
from moejax.config.params import Layer, Params
from moejax.config.step_inputs import StepInputs
from moejax.config.weight_formats import look_up
from moejax.model.decoder import StepContext, StepOutputs, attend, layer_at, rows_needed
from moejax.model.feed_forward import feed_forward, routed_feed_forward
from moejax.model.layers import rms_norm, row_dot
from moejax.model.logits import head_logits
from moejax.model.step_shape import StepShape
from planner.inputs.workload import MAX_DRAFTS
from planner.plan.step_layout import TILE

NO_GUESS = -1
"""In the place of a guess that was not made."""


@struct.dataclass
class DraftOutputs:
    """A step's outputs with those of multi-token prediction. Leaves are arrays or partition specs."""

    drafts: Any
    """Guesses of the tokens after the sampled one `[Z, n]`; NO_GUESS for none. A prefill tile gets the first alone."""
    new_kv: Any
    """The new keys and values of all layers `[L, R, width]`."""
    expert_load: Any
    """Rows sent to each expert of all layers `[moe layers, E]`."""


def draft(
    params: Params,
    cache: KVCache,
    expert_to_slot: Int[ArrayLike, "moe E"],
    inputs: StepInputs,
    outputs: StepOutputs,
    sampled_Z: Int[ArrayLike, " Z"],
    shape: StepShape,
    drafts: int,
) -> DraftOutputs:
    """One rank's drafts, `drafts` for each decode segment, after a step with these outputs and sampled tokens."""
    cfg, B = shape.cfg, shape.bucket.decode
    layer = layer_at(params.segments[-1][0], jnp.int32(0))
    samples_Z = inputs.sample_position > 0
    follow = dataclasses.replace(inputs, tokens=following_tokens(inputs, sampled_Z, samples_Z, B))
    context = StepContext(cache=cache, inputs=follow, shape=shape)
    x_RD, kv, load = _pass(params, layer, outputs.hidden, expert_to_slot, context)
    x_ZD = _head_rows(params, x_RD[inputs.sample_row], shape)
    guesses = [jnp.where(samples_Z, guess(params, x_ZD), NO_GUESS)]
    strips = _strips(kv, inputs, B, drafts)
    for nth in range(1, drafts if B else 1):
        ahead = _ahead(inputs, guesses[-1], samples_Z, nth, shape, strips.entries // B)
        merge = functools.partial(_put, strips, inputs, B, nth)
        part = dataclasses.replace(shape, bucket=dataclasses.replace(shape.bucket, tiles=0))
        context = StepContext(cache=cache, inputs=ahead, shape=part, merge_kv=merge)
        x_BD, strips, more = _pass(params, layer, x_ZD[:B], expert_to_slot, context)
        x_ZD = _head_rows(params, x_BD, shape)
        load = load + more
        made_B = jnp.where(ahead.positions >= 0, guess(params, x_ZD), NO_GUESS)
        guesses.append(jnp.concatenate([made_B, jnp.full((shape.bucket.tiles,), NO_GUESS, made_B.dtype)]))
    new = jax.tree.map(lambda step, one: step.at[-1].set(finite(one)), outputs.new_kv, kv)
    loads = outputs.expert_load if cfg.moe is None else outputs.expert_load.at[-1].set(load)
    return DraftOutputs(drafts=jnp.stack(guesses, axis=1), new_kv=new, expert_load=loads)


def following_tokens(
    inputs: StepInputs, sampled_Z: Int[ArrayLike, " Z"], samples_Z: Bool[ArrayLike, " Z"], decode: int
) -> Int[ArrayLike, " R"]:
    """The token after each row: that of the next row of a tile's chunk, and the sampled one after a row that samples. 0
    after the end of a chunk that does not sample."""
    rows = jnp.arange(len(inputs.tokens))
    next_R = jnp.roll(inputs.tokens, -1)
    base_R = jnp.concatenate([inputs.new_base[:decode], jnp.repeat(inputs.new_base[decode:], TILE)])
    goes_on_R = (jnp.roll(inputs.positions, -1) == inputs.positions + 1) & (rows >= decode) & (rows < len(rows) - 1)
    goes_on_R &= jnp.roll(base_R, -1) == base_R  # else the next row is of another request
    follow_R = jnp.where(goes_on_R, next_R, 0)
    place_Z = jnp.where(samples_Z, inputs.sample_row, len(rows))
    return follow_R.at[place_Z].set(jnp.maximum(sampled_Z, 0), mode="drop")


def layer_input(
    params: Params, tokens_T: Int[ArrayLike, " T"], hidden_TD: Float[ArrayLike, "T D"], shape: StepShape
) -> Float[ArrayLike, "T D"]:
    """The rows that the layer takes, of tokens and of the hidden states before them."""
    cfg, mtp = shape.cfg, params.mtp
    assert mtp is not None
    embedded_TD = look_up(params.embed, tokens_T) * cfg.embed_scale
    normed = (
        rms_norm(embedded_TD, mtp.token_norm, cfg.norm_eps),
        rms_norm(hidden_TD, mtp.hidden_norm, cfg.norm_eps),
    )
    return row_dot(jnp.concatenate(normed, axis=-1), mtp.project)


def _head_rows(params: Params, x_TD: Float[ArrayLike, "T D"], shape: StepShape) -> Float[ArrayLike, "T D"]:
    """The rows that the head takes, and the next guess in the place of those of the main model."""
    assert params.mtp is not None
    return rms_norm(x_TD, params.mtp.norm, shape.cfg.norm_eps)


def guess(params: Params, hidden_TD: Float[ArrayLike, "T D"]) -> Int[ArrayLike, " T"]:
    """The likeliest token after these rows."""
    return jnp.argmax(head_logits(params.logits, hidden_TD), axis=-1).astype(jnp.int32)


def finite(x: Float[ArrayLike, "R width"]) -> Float[ArrayLike, "R width"]:
    """The rows, zeros where one is not finite: entries of the cache are numbers, whoever reads their page."""
    return jnp.where(jnp.isfinite(x).all(-1, keepdims=True), x, 0.0)


def _pass(
    params: Params,
    layer: Layer,
    hidden_TD: Float[ArrayLike, "T D"],
    expert_to_slot: Int[ArrayLike, "moe E"],
    context: StepContext,
) -> tuple[Float[ArrayLike, "T D"], KVCache, Int[ArrayLike, " E"]]:
    """One pass over the layer: its output, its new keys and values, and the rows sent to each expert."""
    inputs, shape, index = context.inputs, context.shape, jnp.int32(context.shape.cfg.n_layers)
    with jax.named_scope("mtp"):
        x_TD = layer_input(params, inputs.tokens, hidden_TD, shape)
        x_TD = jnp.where(inputs.positions[:, None] >= 0, x_TD, 0)
        x_TD, kv = attend(x_TD, layer, index, context, shape.cfg)
        wanted = rows_needed(inputs, index, shape.cfg)
        if layer.moe is None:
            return feed_forward(x_TD, layer, wanted, shape.cfg), kv, jnp.zeros((0,), jnp.int32)
        x_TD, load_E = routed_feed_forward(x_TD, layer, "moe", expert_to_slot[-1], wanted, shape)
    return x_TD, kv, load_E


def _strips(kv: KVCache, inputs: StepInputs, decode: int, drafts: int) -> KVCache:
    """For each decode segment a strip of rows: the new keys and values of its request from its first new row on, and
    room for those of guesses `[B * W, width]`."""
    width = min(MAX_DRAFTS + 1, decode) + drafts - 1
    rows = inputs.new_base[:decode, None] + jnp.arange(width)
    return jax.tree.map(lambda each: finite(each)[jnp.clip(rows.reshape(-1), 0, len(each) - 1)], kv)


def _put(strips: KVCache, inputs: StepInputs, decode: int, nth: int, new: KVCache) -> KVCache:
    """The strips with the keys and values of guess number `nth` behind the new rows of each segment."""
    width = strips.entries // decode
    place_B = jnp.clip(inputs.positions[:decode] - inputs.cached[:decode] + nth, 0, width - 1)
    at_B = jnp.arange(decode) * width + place_B
    return jax.tree.map(lambda strip, rows: strip.at[at_B].set(rows), strips, new)


def _ahead(
    inputs: StepInputs,
    guesses_Z: Int[ArrayLike, " Z"],
    samples_Z: Bool[ArrayLike, " Z"],
    nth: int,
    shape: StepShape,
    width: int,
) -> StepInputs:
    """The inputs of guess number `nth` of each decode segment: the guess before it, at the next position; new rows lie
    in strips of this width. Segments without a guess, or at the end of the page table, are padding."""
    B = shape.bucket.decode
    positions_B = inputs.positions[:B] + nth
    real_B = samples_Z[:B] & (guesses_Z[:B] >= 0) & (inputs.positions[:B] >= 0)
    real_B &= positions_B < shape.bucket.max_pages * shape.page_size
    fields = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    own = {name: array[:B] for name, array in fields.items() if array is not None}
    return dataclasses.replace(
        StepInputs(**own),
        tokens=jnp.maximum(guesses_Z[:B], 0),
        positions=jnp.where(real_B, positions_B, -1),
        new_base=jnp.arange(B) * width,
        read=jnp.ones((B,), inputs.read.dtype),
    )
