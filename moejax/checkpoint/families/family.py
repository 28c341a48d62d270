"""A family of models that is served: which configurations it refuses, and what its checkpoints call our parameters."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from moejax.checkpoint.families.source import IDENTITY, Transform
from moejax.config.model_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class TensorNames:
    """The tensors one leaf comes from, with `{layer}` and `{expert}` to fill in (and `ServedFamily.numbers`), and how
    they become it.

    Names of a routed expert's leaf without `{expert}` are tensors with all experts on their first axis. Without names,
    checkpoints have no such tensor, and the leaf is zeros.
    """

    names: tuple[str, ...]
    transform: Transform = IDENTITY


NameMap = Mapping[str, TensorNames]
"""By the end of a leaf's path: `embed`, `qkv`, `moe.experts.gate_up`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedFamily:
    """`names` gives the name map. Fields of config.json in `only` must be absent or have the value given there.

    Tensors whose name matches one of the `unused` patterns (fnmatch) are in published checkpoints without a place in
    the decoder. In a checkpoint that has other parts beside the decoder, names of the decoder that begin with a key of
    `moved` begin with its value instead, and tensors that match one of `beside` belong to the other parts. `numbers`
    gives further fields of names for a layer, where layers are not counted as ours are.
    """

    names: Callable[[ModelConfig], NameMap]
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    unused: Callable[[ModelConfig], tuple[str, ...]] = lambda cfg: ("*.rotary_emb.inv_freq",)
    moved: Mapping[str, str] = dataclasses.field(default_factory=dict)
    beside: tuple[str, ...] = ()
    numbers: Callable[[ModelConfig, int], Mapping[str, int]] = lambda cfg, layer: {}

    def published(self, name: str) -> str:
        """The name of a tensor of the decoder in published checkpoints."""
        for ours, theirs in self.moved.items():
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name
