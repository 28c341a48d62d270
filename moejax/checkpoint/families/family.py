"""A family of published models: which configurations it reads, and what its checkpoints call our parameters."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from moejax.config import ModelConfig
from moejax.families.fields import Fields
from moejax.families.source import SAME, Transform


@dataclasses.dataclass(frozen=True)
class Names:
    """The tensors one leaf comes from, with `{layer}` and `{expert}` to fill in, and how they become it.

    Names of a routed expert's leaf without `{expert}` are tensors with all experts on their first axis. No names:
    checkpoints have no such tensor, and zeros are meant.
    """

    names: tuple[str, ...]
    transform: Transform = SAME


NameMap = Mapping[str, Names]
"""By the end of a leaf's path: `embed`, `qkv`, `moe.experts.gate_up`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """`architectures` are the classes that config.json may name beside `model_type`. `read` gives the fields of
    ModelConfig (all but name and family), `names` the name map. Tensors whose name matches one of the `unused` patterns
    (fnmatch) are in published checkpoints without a place in the decoder."""

    model_type: str
    architectures: tuple[str, ...]
    read: Callable[[Fields], dict[str, Any]]
    names: Callable[[ModelConfig], NameMap]
    unused: Callable[[ModelConfig], tuple[str, ...]] = lambda cfg: ("*.rotary_emb.inv_freq",)
