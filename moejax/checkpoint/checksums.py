"""Weights that are checked against their checksums, whichever store they are read from."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from moejax.checkpoint.errors import Expert
from moejax.checkpoint.manifest import Manifest, checksum, expert_position
from moejax.config.model_config import ModelConfig
from moejax.config.params import Params, is_expert, is_spec, named_tensors, param_specs

EXPERT_PARTS = ("gate_up", "down", "gate_up_bias", "down_bias")
"""The leaves of an expert, in the order they are read; a model has the first two at least."""

ALIGNMENT = 64
"""Bytes; XLA:CPU takes host arrays at such addresses as they are."""


class ChecksummedWeights:
    """The weights of `cfg`, as `manifest` describes them."""

    def __init__(self, cfg: ModelConfig, manifest: Manifest) -> None:
        self.cfg = cfg
        self._manifest = manifest

    @property
    def bytes(self) -> int:
        """Bytes of all weights, as stored."""
        return sum(tensor.bytes for tensor in self._manifest.tensors.values())

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """Number format of each tensor, as stored."""
        return {name: jax.numpy.dtype(tensor.dtype) for name, tensor in self._manifest.tensors.items()}

    def is_intact(self, expert: Expert, *parts: np.ndarray) -> bool:
        """Whether these parts, as `read_experts` gives them, are bit for bit those stored for the expert."""
        segment, position, repeat = expert_position(self.cfg, expert[0])
        names = [f"segments.{segment}.{position}.moe.experts.{part}" for part in EXPERT_PARTS]
        tensors = [self._manifest.tensors[name] for name in names if name in self._manifest.tensors]
        return all(
            checksum(array.astype(np.dtype(tensor.dtype), copy=False))
            == tensor.crc32[repeat * tensor.shape[1] + expert[1]]
            for tensor, array in zip(tensors, parts, strict=True)
        )

    def corrupt_tensors(self, params: Params) -> list[str]:
        """Names of the tensors of `params`, expert leaves left out, that differ from those stored."""
        arrays = {
            name: leaf for name, leaf in named_tensors(params).items() if leaf is not None and not is_expert(name)
        }
        tensors = self._manifest.tensors
        return [
            name
            for name, array in arrays.items()
            if self._manifest.corrupt_chunks(name, np.asarray(array).astype(np.dtype(tensors[name].dtype), copy=False))
        ]

    def _expert_bytes(self, expert: Expert) -> int:
        segment, position, _ = expert_position(self.cfg, expert[0])
        tensors = [
            self._manifest.tensors.get(f"segments.{segment}.{position}.moe.experts.{part}") for part in EXPERT_PARTS
        ]
        return sum(t.bytes // (t.shape[0] * t.shape[1]) for t in tensors if t is not None)


def params_without_experts(cfg: ModelConfig, arrays: Mapping[str, Any]) -> Params:
    """The parameter tree of these arrays, or `Quantized` ones, by name; leaves that are not among them, the experts',
    are None."""

    def leaf(path: Any, _: Any) -> Any:
        return arrays.get(jax.tree_util.keystr(path, simple=True, separator="."))

    return jax.tree_util.tree_map_with_path(leaf, param_specs(cfg), is_leaf=is_spec)


def aligned_array(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in this format, at an address that a device of the host can use without a copy."""
    if array.dtype == dtype and array.ctypes.data % ALIGNMENT == 0:
        return array
    room = np.empty(array.size * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    moved = room[start : start + array.size * dtype.itemsize].view(dtype).reshape(array.shape)
    np.copyto(moved, array, casting="unsafe")
    return moved
