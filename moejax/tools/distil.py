"""Distils split layers against the dense layers that they were made of, one after the other, on a text.

1. The router is trained with Adam to leave those experts out whose outputs together are least missed: every set of
   experts that can be left out has a probability by the router's scores, and the loss is the expected squared error of
   the layer's output. That is exact, where the choice of a top-k has no gradient.
2. What the chosen experts lack is corrected: the down projections of shared and routed experts are fitted once more, by
   ridge regression towards the weights they had, with the experts that the trained router leaves out at zero.

A token's error counts relative to the residual stream it is added to, as the norm of the next layer sees it. A layer
that leaves no expert out is not changed.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg

from moejax.checkpoint.manifest import expert_position
from moejax.config.config_values import ConfigError
from moejax.config.model_config import ModelConfig
from moejax.config.moe_config import MoEConfig
from moejax.config.params import FeedForward, MoE, Params
from moejax.model.router import route
from moejax.tools.layer_inputs import write_whole
from moejax.tools.moefy import fit_router

CHUNK = 2048
"""Tokens whose neurons are in memory at once."""
MAX_SETS = 512
"""Most sets of experts that a router may choose from."""
SHARPNESS = 4.0
"""Factor of the scores when the training of a router starts; it is trained as well."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation:
    """How layers are distilled: `steps` of Adam with `batch` tokens each, whose rate falls from `rate` to zero, for a
    router, which starts from a regression with the penalty `router_ridge`; `ridge` is the penalty of a correction,
    relative to the strength of each neuron."""

    steps: int
    batch: int
    rate: float
    router_ridge: float
    ridge: float


def distil_layer(moe: MoE, cfg: MoEConfig, x_TD: np.ndarray, weight_T: np.ndarray, how: Distillation) -> MoE:
    """The distilled form of one split layer, from the inputs that the dense layer has for a text, and how much the
    squared error of each token counts. Raises ConfigError when the sets of experts to leave out are too many."""
    if cfg.experts_per_token == cfg.experts:
        return moe
    sets_SE = left_out_sets(cfg)
    products_TEE = output_products(moe.experts, x_TD)
    router_ED, bias_E = train_router(x_TD, weight_T, products_TEE, sets_SE, how)
    return correct_outputs(dataclasses.replace(moe, router=router_ED, bias=bias_E), cfg, x_TD, weight_T, how.ridge)


def distil_model(
    params: Params,
    cfg: ModelConfig,
    inputs: Callable[[int], tuple[np.ndarray, np.ndarray]],
    how: Distillation,
    draft: Path,
    done: Callable[[], None],
) -> Params:
    """The parameters of a split model with each of its MoE layers distilled. `inputs(layer)` are those of
    `distil_layer`, counted over MoE layers; `draft` keeps the layers that are done, from which an interrupted run goes
    on; `done` is called after each."""
    assert cfg.moe is not None
    segments = [list(segment) for segment in params.segments]
    made: dict[tuple[int, int], list[MoE]] = {}
    for layer in range(cfg.n_moe_layers):
        i, j, repeat = expert_position(cfg, layer)
        split = jax.tree.map(lambda leaf, repeat=repeat: np.asarray(leaf[repeat]), segments[i][j].moe)
        tree = jax.tree.structure(split)
        file = draft / f"layer-{layer:02}.npz"
        if not file.is_file():
            distilled = distil_layer(split, cfg.moe, *inputs(layer), how)
            write_whole(file, lambda to, made=distilled: np.savez(to, *jax.tree.leaves(made)))
        with np.load(file) as stored:
            leaves = [stored[name] for name in stored.files]
        made.setdefault((i, j), []).append(jax.tree.unflatten(tree, leaves))
        done()
    for (i, j), layers in made.items():
        moe = jax.tree.map(lambda *each: np.stack(each), *layers)
        segments[i][j] = dataclasses.replace(segments[i][j], moe=moe)
    return dataclasses.replace(params, segments=tuple(map(tuple, segments)))


def left_out_sets(cfg: MoEConfig) -> np.ndarray:
    """The sets of experts that a token can leave out `[S, E]`, 1 where an expert is left out. Raises ConfigError when
    they are more than MAX_SETS."""
    count = cfg.experts - cfg.experts_per_token
    if (sets := math.comb(cfg.experts, count)) > MAX_SETS:
        raise ConfigError(
            f"{cfg.experts_per_token} of {cfg.experts} experts can be chosen in {sets} ways; a router is distilled for "
            f"at most {MAX_SETS}. Choose fewer experts, or no distillation."
        )
    found = np.zeros((sets, cfg.experts), np.float32)
    for row, experts in enumerate(itertools.combinations(range(cfg.experts), count)):
        found[row, list(experts)] = 1
    return found


def output_products(experts: FeedForward, x_TD: np.ndarray) -> np.ndarray:
    """The dot products of the outputs of each two experts `[T, E, E]`."""
    return np.concatenate([np.asarray(_output_products(experts, x)) for x in _chunks(x_TD)])


@jax.jit
def _output_products(experts: FeedForward, x_TD: jax.Array) -> jax.Array:
    outputs_ETD = jax.vmap(lambda e: neurons(x_TD, e.gate_up) @ e.down.T)(experts)
    return jnp.einsum("etd,ftd->tef", outputs_ETD, outputs_ETD)


def neurons(x_TD: jax.Array, gate_up_2FD: jax.Array) -> jax.Array:
    """The activations of a SwiGLU layer, which its down projection reads."""
    gate_TF, up_TF = jnp.split(x_TD @ gate_up_2FD.T, 2, axis=-1)
    return jax.nn.silu(gate_TF) * up_TF


def train_router(
    x_TD: np.ndarray,
    weight_T: np.ndarray,
    products_TEE: np.ndarray,
    sets_SE: np.ndarray,
    how: Distillation,
) -> tuple[np.ndarray, np.ndarray]:
    """Router `[E, D]` and bias `[E]` that leave out the set of experts whose outputs, of these dot products, are least
    missed."""
    norms_TE = np.sqrt(np.einsum("tee->te", products_TEE))
    router_ED, bias_E = fit_router(x_TD, np.log(norms_TE + 1e-6), how.router_ridge)
    error_TS = np.einsum("se,tef,sf->ts", sets_SE, products_TEE, sets_SE, optimize=True) * weight_T[:, None]
    error_TS /= error_TS.mean()
    rate = optax.cosine_decay_schedule(how.rate, how.steps)
    optimizer = optax.adam(rate)
    weights = {"router": jnp.asarray(router_ED), "bias": jnp.asarray(bias_E), "sharpness": jnp.float32(SHARPNESS)}
    state, order = optimizer.init(weights), np.random.default_rng(0)
    for _ in range(how.steps):
        rows = order.integers(0, len(x_TD), how.batch)
        weights, state = _router_step(optimizer, sets_SE, weights, state, x_TD[rows], error_TS[rows])
    return np.asarray(weights["router"]), np.asarray(weights["bias"])


def expected_error(
    weights: dict[str, jax.Array],
    sets_SE: jax.Array,
    x_TD: jax.Array,
    error_TS: jax.Array,
) -> jax.Array:
    """The mean error of the sets that are left out, each with its probability."""
    scores_TE = (x_TD @ weights["router"].T + weights["bias"]) * weights["sharpness"]
    return (jax.nn.softmax(-scores_TE @ sets_SE.T) * error_TS).sum(-1).mean()


@partial(jax.jit, static_argnums=0)
def _router_step(
    optimizer: optax.GradientTransformation,
    sets_SE: jax.Array,
    weights: dict[str, jax.Array],
    state: optax.OptState,
    x_TD: jax.Array,
    error_TS: jax.Array,
) -> tuple[dict[str, jax.Array], optax.OptState]:
    gradient = jax.grad(expected_error)(weights, sets_SE, x_TD, error_TS)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(weights, updates), state  # pyright: ignore[reportReturnType]


def correct_outputs(moe: MoE, cfg: MoEConfig, x_TD: np.ndarray, weight_T: np.ndarray, ridge: float) -> MoE:
    """The layer with down projections that make up for the experts that its router leaves out, as far as the neurons
    of the others fire with theirs. `ridge` is the penalty of a change, relative to the strength of each neuron."""
    count = cfg.d_shared + cfg.experts * cfg.d_expert
    products_FF = np.zeros((count, count))
    wanted_FD = np.zeros((count, x_TD.shape[1]))
    for x, weight in zip(_chunks(x_TD), _chunks(weight_T), strict=True):
        part_FF, part_FD = _correlations(moe, cfg, x, weight)
        products_FF += np.asarray(part_FF)
        wanted_FD += np.asarray(part_FD)
    strength_F = np.diag(products_FF)
    penalty_F = ridge * strength_F + 1e-6 * strength_F.mean()
    change_FD = scipy.linalg.solve(products_FF + np.diag(penalty_F), wanted_FD, assume_a="pos").astype(np.float32)
    shared_SD, experts_FD = np.split(change_FD, [cfg.d_shared])
    experts_EDF = experts_FD.reshape(cfg.experts, cfg.d_expert, -1).swapaxes(1, 2)
    shared = moe.shared
    if shared is not None:
        shared = dataclasses.replace(shared, down=shared.down + shared_SD.T)
    experts = dataclasses.replace(moe.experts, down=moe.experts.down + experts_EDF)
    return dataclasses.replace(moe, shared=shared, experts=experts)


@partial(jax.jit, static_argnames=("cfg",))
def _correlations(moe: MoE, cfg: MoEConfig, x_TD: jax.Array, weight_T: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The weighted products of neurons with each other `[F, F]`, those of left-out experts at zero, and with what the
    layer lacks `[F, D]`."""
    chosen_TX = route(x_TD, moe.router, moe.bias, jnp.ones(cfg.experts, bool), cfg)[0]
    kept_TE = jax.nn.one_hot(chosen_TX, cfg.experts).sum(1)
    neurons_ETF = jax.vmap(lambda e: neurons(x_TD, e.gate_up))(moe.experts)
    left_ETF = neurons_ETF * (1 - kept_TE).T[..., None]
    lacking_TD = jnp.einsum("etf,edf->td", left_ETF, moe.experts.down)
    kept_TF = (neurons_ETF - left_ETF).swapaxes(0, 1).reshape(len(x_TD), -1)
    if moe.shared is not None:
        kept_TF = jnp.concatenate([neurons(x_TD, moe.shared.gate_up), kept_TF], axis=1)
    weighted_FT = (kept_TF * weight_T[:, None]).T
    return weighted_FT @ kept_TF, weighted_FT @ lacking_TD


def _chunks(rows: np.ndarray) -> list[np.ndarray]:
    """The rows in pieces of at most CHUNK."""
    return [rows[at : at + CHUNK] for at in range(0, len(rows), CHUNK)]
