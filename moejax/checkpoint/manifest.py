"""The manifest of a checkpoint: every tensor's name, shape, dtype and the CRC-32 of each of its chunks.

A tensor is named by the dotted path in `Params`, as Orbax names it
(`segments.0.2.moe.experts.gate_up`). Expert tensors `[R, E, ...]` have one chunk per expert; others have one, or, in
converted models, one per repeat `[R, ...]`, so that no more than a layer's part need be in memory. Checksums are of the
decoded numbers in C order, so they hold for any codec or storage layout.
"""

import dataclasses
import hashlib
import json
import math
import zlib
from pathlib import Path

import jax
import numpy as np

from moejax.config.config_values import ConfigError
from moejax.config.model_config import ModelConfig, in_slots
from moejax.config.params import is_expert, tensor_specs

FILE = "checksums.json"


class CheckpointError(ValueError):
    """A model folder that cannot be used: the message names the file, the tensor and what was expected."""


@dataclasses.dataclass(frozen=True)
class TensorRecord:
    """One stored tensor. `crc32[r * E + e]` is expert e of repeat r, `crc32[r]` repeat r of other tensors; a tensor in
    one chunk has one."""

    shape: tuple[int, ...]
    dtype: str
    crc32: tuple[int, ...]

    @property
    def chunked_axes(self) -> int:
        """How many axes in front count chunks. Raises ValueError when the checksums are not of this shape."""
        for axes in range(len(self.shape) + 1):
            if math.prod(self.shape[:axes]) == len(self.crc32):
                return axes
        raise ValueError(f"{len(self.crc32)} checksums of a tensor of shape {self.shape}")

    @property
    def bytes(self) -> int:
        """Bytes of all its numbers."""
        return math.prod(self.shape) * jax.numpy.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The tensors of a checkpoint by name."""

    tensors: dict[str, TensorRecord]

    @classmethod
    def of(cls, arrays: dict[str, np.ndarray]) -> "Manifest":
        """Describe the arrays about to be stored."""
        return cls(
            {n: TensorRecord(a.shape, a.dtype.name, _checksums(a, 2 if is_expert(n) else 0)) for n, a in arrays.items()}
        )

    def to_json(self) -> str:
        """One line per tensor, so that two manifests can be compared by eye."""
        rows = (f"  {json.dumps(n)}: {json.dumps(dataclasses.asdict(t))}" for n, t in sorted(self.tensors.items()))
        return "{\n" + ",\n".join(rows) + "\n}\n"

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read `checksums.json` of a model folder. Raises CheckpointError when it is absent or unreadable."""
        path = Path(folder) / FILE
        try:
            values = json.loads(path.read_text())
            found = {n: TensorRecord(tuple(t["shape"]), t["dtype"], tuple(t["crc32"])) for n, t in values.items()}
            for tensor in found.values():
                _ = tensor.chunked_axes, tensor.bytes
            return cls(found)
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist; write the model again with save_model.") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); write the model again.") from error

    def check_config(self, cfg: ModelConfig, folder: Path) -> None:
        """Raise CheckpointError unless these are the tensors of `cfg`: names the first that is not."""
        specs = tensor_specs(cfg)
        for name, spec in specs.items():
            tensor = self.tensors.get(name)
            if tensor is None:
                raise CheckpointError(
                    f"{folder}: tensor {name} of shape {spec.shape} is missing from the checkpoint, "
                    f"which holds {len(self.tensors)} of the {len(specs)} tensors of {cfg.name}."
                )
            if tensor.shape != spec.shape:
                raise CheckpointError(
                    f"{folder}: tensor {name} has shape {tensor.shape}, but config.json of {cfg.name} "
                    f"says {spec.shape}. The two belong to different models."
                )
        for name in self.tensors:
            if name not in specs:
                raise CheckpointError(f"{folder}: tensor {name} is in the checkpoint but not in {cfg.name}.")

    def corrupt_chunks(self, name: str, array: np.ndarray) -> list[int]:
        """Chunks of a tensor whose numbers differ from those stored; empty when none does."""
        tensor = self.tensors[name]
        found = _checksums(array, tensor.chunked_axes)
        return [i for i, (a, b) in enumerate(zip(found, tensor.crc32, strict=True)) if a != b]


def content_hash(folder: Path) -> str:
    """16 hexadecimal digits that identify the configuration and every parameter of a model folder.

    Raises CheckpointError when a file of the folder is missing.
    """
    digest = hashlib.sha256()
    for name in ("config.json", FILE):
        try:
            digest.update((Path(folder) / name).read_bytes())
        except FileNotFoundError:
            raise CheckpointError(f"{Path(folder) / name} does not exist; this is no model folder.") from None
    return digest.hexdigest()[:16]


def expert_position(cfg: ModelConfig, moe_layer: int) -> tuple[int, int, int]:
    """The (segment, position, repeat) of MoE layer number `moe_layer`, counted by depth among layers with experts in
    slots.

    Raises ConfigError when the model has no such layer.
    """
    if not 0 <= moe_layer < cfg.n_moe_layers:
        raise ConfigError(f"{cfg.name} has {cfg.n_moe_layers} MoE layers; there is no number {moe_layer}.")
    before = 0
    for segment, (pattern, repeats) in enumerate(cfg.segments):
        positions = [i for i, kind in enumerate(pattern) if in_slots(kind)]
        inside = moe_layer - before
        if inside < repeats * len(positions):
            repeat, which = divmod(inside, len(positions))
            return segment, positions[which], repeat
        before += repeats * len(positions)
    raise AssertionError("segments and n_moe_layers disagree")


def checksum(array: np.ndarray) -> int:
    """CRC-32 of an array's bytes in C order (2 GB/s: 0.5 ms for an expert of a megabyte)."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _checksums(array: np.ndarray, chunked_axes: int) -> tuple[int, ...]:
    chunks = array.reshape(-1, *array.shape[chunked_axes:]) if chunked_axes else array[None]
    return tuple(checksum(chunk) for chunk in chunks)
