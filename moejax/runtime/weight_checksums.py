"""Checksums of a rank's weights, compared with those of their source."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from moejax.checkpoint.manifest import checksum
from moejax.config.model_config import ModelConfig
from moejax.config.params import FeedForward, Params, named_tensors


@runtime_checkable
class WeightSource(Protocol):
    """The source of a rank's weights: `moejax.checkpoint.host_store.HostStore`, or a fake."""

    def non_expert_params(self) -> Params:
        """All weights that are not experts, as host arrays; expert leaves are None."""
        ...

    def read_experts(self, wanted: list[tuple[int, int]]) -> Mapping[tuple[int, int], tuple[Any, ...]]:
        """The parts of each (MoE layer, expert): gate_up `[2F, D]`, down `[D, F]`, their biases if it has any;
        `Quantized` for matrices that are held as they are published. Raises StoreError."""
        ...

    def is_intact(self, expert: tuple[int, int], *parts: np.ndarray) -> bool:
        """True when these are the expert's weights in every bit."""
        ...

    def corrupt_tensors(self, params: Params) -> list[str]:
        """Names of the weights, experts aside, that differ from the source."""
        ...


class WeightChecksums:
    """Checksums of weights in the rank's format. The source has those of float32 weights; for other formats, and for a
    tp shard, they are taken when the weights are made from the source's."""

    def __init__(self, cfg: ModelConfig, source: WeightSource) -> None:
        self._cfg, self._source = cfg, source
        self._same = cfg.weights == "float32"
        self._same_common = self._same and cfg.tensor == 1
        self._experts: dict[tuple[int, int], tuple[int, ...]] = {}
        self._common: dict[str, int] = {}

    def note_common(self, weights: Params) -> None:
        """Take the checksums of the common weights, unless the source has them."""
        if not self._same_common:
            self._common = {name: checksum(leaf) for name, leaf in named_tensors(weights).items()}

    def note(self, expert: tuple[int, int], weights: FeedForward) -> None:
        """Take the checksums of an expert, unless the source has them."""
        if not self._same:
            self._experts[expert] = checksums_of(weights)

    def of(self, expert: tuple[int, int]) -> tuple[int, ...]:
        """The checksums taken of an expert; empty if there are none."""
        return self._experts.get(expert, ())

    def verify(self, expert: tuple[int, int], weights: FeedForward, checksums: tuple[int, ...]) -> bool:
        """True when weights from another rank are the expert's; `checksums` are used where this rank knows none."""
        if not self._same and checksums:
            self._experts.setdefault(expert, checksums)
        return self.is_intact(expert, weights)

    def is_intact(self, expert: tuple[int, int], weights: FeedForward) -> bool:
        """True when these are the expert's weights in every bit."""
        if self._same:
            return self._source.is_intact(expert, *jax.tree.leaves(weights))
        return self._experts.get(expert) == checksums_of(weights)

    def damaged(self, common: Params) -> list[str]:
        """Names of the common weights that differ from the source."""
        if self._same_common:
            return self._source.corrupt_tensors(common)
        return [
            name for name, leaf in named_tensors(common).items() if checksum(np.asarray(leaf)) != self._common[name]
        ]


def checksums_of(weights: FeedForward) -> tuple[int, ...]:
    """The checksum of each leaf."""
    return tuple(map(checksum, jax.tree.leaves(weights)))
