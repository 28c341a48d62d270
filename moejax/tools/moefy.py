"""Splits dense feed-forward layers into a shared expert and routed experts, without training.

The neurons that contribute most on calibration text become the shared expert; the others are clustered by how they
fire together (MoEfication, arXiv 2110.01786), into experts of one size. The router is a ridge regression from
the layer's input to the logarithm of the norm of each expert's output. Each chosen expert counts in full, so
with all experts chosen the layer is the dense one.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import numpy as np
from scipy.optimize import linear_sum_assignment

from moejax.config.config_values import ConfigError
from moejax.config.model_config import ModelConfig
from moejax.config.moe_config import MoEConfig
from moejax.config.params import FeedForward, Layer, MoE, Params

ROUNDS = 12
"""Most rounds of balanced k-means; it settles in fewer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """The layers to split and how: every `every`-th, `shared` neurons in the shared expert, the rest in routed
    experts.

    `ridge` is the penalty of the router's regression per calibration token (inputs have unit variance).
    """

    every: int
    experts: int
    experts_per_token: int
    shared: int
    ridge: float

    @property
    def label(self) -> str:
        """A short name that no other split has."""
        return f"every{self.every}-{self.shared}+{self.experts}top{self.experts_per_token}-ridge{self.ridge:g}"

    def config(self, dense: ModelConfig, name: str) -> ModelConfig:
        """The configuration of a dense model once it is split.

        Raises ConfigError when the experts cannot be of one size.
        """
        rest = dense.d_ff - self.shared
        if rest <= 0 or rest % self.experts:
            raise ConfigError(
                f"{dense.d_ff} neurons less {self.shared} shared leave {rest}, which {self.experts} experts "
                "cannot share evenly. Choose other numbers of shared neurons or experts."
            )
        moe = MoEConfig(
            experts=self.experts,
            experts_per_token=self.experts_per_token,
            d_expert=rest // self.experts,
            d_shared=self.shared,
            gate="one",
        )
        return dataclasses.replace(dense, name=name, moe=moe, moe_every=self.every)


def split_model(
    params: Params,
    cfg: ModelConfig,
    inputs: Mapping[int, np.ndarray] | np.ndarray,
    ridge: float,
    done: Callable[[], None],
) -> Params:
    """The parameters of `cfg`, from those of the dense model and the feed-forward inputs `[T, D]` of each layer that is
    split, by its number.

    `done` is called after each split layer. Leaves are NumPy arrays.
    """
    assert cfg.moe is not None
    stacked = jax.tree.map(np.asarray, params.segments[0][0])
    layers = []
    for i, kind in enumerate(cfg.layer_kinds):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
        if kind == "moe":
            assert layer.ffn is not None
            layer = layer.replace(ffn=None, moe=split_layer(layer.ffn, cfg.moe, np.asarray(inputs[i]), ridge))
            done()
        layers.append(layer)
    return dataclasses.replace(params, segments=_segments(cfg, layers))


def _segments(cfg: ModelConfig, layers: list[Layer]) -> tuple[tuple[Layer, ...], ...]:
    """Single layers in order, stacked as `Params.segments` has them."""
    segments, first = [], 0
    for pattern, repeats in cfg.segments:
        count = len(pattern) * repeats
        block = layers[first : first + count]
        first += count
        positions = [block[i :: len(pattern)] for i in range(len(pattern))]
        segments.append(tuple(jax.tree.map(lambda *leaves: np.stack(leaves), *same) for same in positions))
    return tuple(segments)


def split_layer(ffn: FeedForward, moe: MoEConfig, x_TD: np.ndarray, ridge: float) -> MoE:
    """The routed form of one dense feed-forward, its router fitted to inputs `x_TD`."""
    gate_FD, up_FD = np.split(ffn.gate_up, 2)
    gate_TF = x_TD @ gate_FD.T
    fired_TF = gate_TF / (1 + np.exp(-gate_TF)) * (x_TD @ up_FD.T)
    weight_TF = np.abs(fired_TF) * np.linalg.norm(ffn.down, axis=0)
    by_contribution = np.argsort(-np.square(weight_TF).mean(0), kind="stable")
    shared, rest = np.sort(by_contribution[: moe.d_shared]), np.sort(by_contribution[moe.d_shared :])
    found = cluster(weight_TF[:, rest], moe.experts)
    groups = [rest[found == e] for e in range(moe.experts)]

    def part(neurons: np.ndarray) -> FeedForward:
        return FeedForward(np.concatenate([gate_FD[neurons], up_FD[neurons]]), ffn.down[:, neurons])

    norms_TE = np.stack([np.linalg.norm(fired_TF[:, g] @ ffn.down[:, g].T, axis=1) for g in groups], axis=1)
    router_ED, bias_E = fit_router(x_TD, np.log(norms_TE + 1e-6), ridge)
    experts = jax.tree.map(lambda *leaves: np.stack(leaves), *[part(g) for g in groups])
    return MoE(router_ED, bias_E, part(shared) if moe.d_shared else None, experts)


def cluster(weight_TF: np.ndarray, groups: int) -> np.ndarray:
    """The group of each neuron `[F]`: balanced spherical k-means on when and how strongly neurons fire.

    Every round assigns neurons to `F / groups` places around each centre at the least total distance.
    """
    unit_FT = (weight_TF / (np.linalg.norm(weight_TF, axis=0) + 1e-9)).T
    unit_FT = unit_FT - unit_FT.mean(0)
    size = len(unit_FT) // groups
    centres = _spread(unit_FT, groups)
    found = np.zeros(len(unit_FT), int)
    for _ in range(ROUNDS):
        likeness_FG = unit_FT @ (centres / (np.linalg.norm(centres, axis=1, keepdims=True) + 1e-9)).T
        neurons, places = linear_sum_assignment(np.repeat(-likeness_FG, size, axis=1))
        before, found = found, np.empty_like(found)
        found[neurons] = places // size
        if np.array_equal(before, found):
            break
        centres = np.stack([unit_FT[found == g].mean(0) for g in range(groups)])
    return found


def _spread(unit_FT: np.ndarray, groups: int) -> np.ndarray:
    """First centres: each the neuron least like those before it."""
    chosen = [0]
    likeness = unit_FT @ unit_FT[0]
    while len(chosen) < groups:
        chosen.append(int(np.argmin(likeness)))
        likeness = np.maximum(likeness, unit_FT @ unit_FT[chosen[-1]])
    return unit_FT[chosen]


def fit_router(x_TD: np.ndarray, target_TE: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression `target ~ x @ router.T + bias`: router `[E, D]`, bias `[E]`, in float32."""
    x, y = x_TD.astype(np.float64), target_TE.astype(np.float64)
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    penalty = ridge * len(x) * np.mean(np.square(x))
    router = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y).T
    return router.astype(np.float32), (mean_y - router @ mean_x).astype(np.float32)
