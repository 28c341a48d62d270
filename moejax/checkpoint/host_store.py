"""The host's copy of a model's weights: ranks read it at the start, and lost experts from it in recovery.

It is the Orbax checkpoint of a model folder, normally in tmpfs, where it outlives any rank. Recovery reads
single experts from it while other processes are dead. Orbax cannot do that: its restore places arrays by a
sharding over live devices, initialises JAX's backends and meets all processes at barriers. So tensorstore,
Orbax's own storage layer, is used directly. No barrier, no lock, no JAX backend: any number of processes read
at once, also before `jax.distributed` is up.
"""

import collections
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from moejax.checkpoint.checksums import EXPERT_PARTS, ChecksummedWeights, aligned_array, params_without_experts
from moejax.checkpoint.errors import Expert, StoreCorrupt, StoreError, StoreMissing, StoreRefused
from moejax.checkpoint.host_copies import ensure_copy, hold_copy, source_of
from moejax.checkpoint.manifest import CheckpointError, Manifest, checksum, expert_position
from moejax.config.config_values import ConfigError
from moejax.config.model_config import ModelConfig
from moejax.config.params import Params, is_expert

__all__ = ["Expert", "HostStore", "StoreCorrupt", "StoreError", "StoreMissing", "StoreRefused"]

IN_FLIGHT = 64 << 20
"""Bytes of reads under way at once; one read may be more."""


class HostStore(ChecksummedWeights):
    """Reads the weights of one model, `cfg`, from `folder`."""

    def __init__(self, folder: Path, cfg: ModelConfig, manifest: Manifest) -> None:
        super().__init__(cfg, manifest)
        self.folder = folder
        self._handles: dict[str, tensorstore.TensorStore] = {}
        self._context = tensorstore.Context({"file_io_concurrency": {"limit": 8}})
        self._lock = hold_copy(folder)

    @classmethod
    def open(cls, folder: Path) -> "HostStore":
        """The store in a folder made by `create`, or straight in a model folder.

        Raises CheckpointError or ConfigError when its description is not readable or not of one model.
        """
        folder = Path(folder)
        cfg, manifest = ModelConfig.load(folder), Manifest.load(folder)
        manifest.check_config(cfg, folder)
        return cls(folder, cfg, manifest)

    @classmethod
    def create(cls, model_folder: Path, place: Path | None = None) -> "HostStore":
        """Copy a model's weights to the host's memory, once (see `moejax.checkpoint.host_copies`): a second call finds
        the copy.

        `place` is /dev/shm/moejax-<uid>/<model>-<content hash> unless given. Without space there the model folder is
        the store, with a warning. Raises StoreRefused for a folder of another owner.
        """
        return cls.open(ensure_copy(Path(model_folder), place))

    def non_expert_params(self, dtype: Any = np.float32) -> Params:
        """All parameters as NumPy arrays except the routed experts, which are `FeedForward(None, None)`.

        They lie where a device of the host can use them without a copy. Raises StoreMissing or StoreCorrupt.
        """
        names = [n for n in self._manifest.tensors if not is_expert(n)]
        wanted = ((n, self._manifest.tensors[n].bytes, lambda n=n: self._handle(n).read()) for n in names)
        arrays = {n: aligned_array(self._whole(n, read), np.dtype(dtype)) for n, read in _read_ahead(wanted)}

        return params_without_experts(self.cfg, arrays)

    def read(self, name: str) -> np.ndarray:
        """A tensor, as it is stored. Raises StoreMissing or StoreCorrupt."""
        return self._whole(name, self._handle(name).read())

    def read_experts(self, wanted: Iterable[Expert], dtype: Any = np.float32) -> dict[Expert, tuple[np.ndarray, ...]]:
        """Gate-up `[2F, D]` and down `[D, F]` of the wanted experts, and their biases if the model has them (`[2F]`,
        `[D]`): only their bytes, many reads at once.

        Raises StoreMissing or StoreCorrupt for the first that fails; its `failed` names all that do.
        """
        found: dict[Expert, tuple[np.ndarray, ...]] = {}
        failed: dict[Expert, StoreError] = {}
        reads = ((expert, self._expert_bytes(expert), lambda e=expert: self._start_reads(e)) for expert in wanted)
        for expert, read in _read_ahead(reads):
            try:
                if isinstance(read, StoreError):
                    raise read
                label = f"expert {expert[1]} of MoE layer {expert[0]}"
                found[expert] = tuple(
                    self._checked(name, chunk, part, label).astype(dtype, copy=False) for name, chunk, part in read
                )
            except StoreError as error:
                failed[expert] = error
        if failed:
            first = next(iter(failed.values()))
            raise type(first)(str(first), failed)
        return found

    def _start_reads(self, expert: Expert) -> list[tuple[str, int, Any]] | StoreError:
        """The tensor, the chunk number in it and the read in flight of each part of an expert."""
        segment, position, repeat = expert_position(self.cfg, expert[0])
        names = [f"segments.{segment}.{position}.moe.experts.{part}" for part in EXPERT_PARTS]
        experts = self._manifest.tensors[names[0]].shape[1]
        if not 0 <= expert[1] < experts:
            return StoreMissing(
                f"{self.cfg.name} has no expert {expert[1]} in MoE layer {expert[0]}: it has {experts}."
            )
        try:
            return [
                (name, repeat * experts + expert[1], self._handle(name)[repeat, expert[1]].read())
                for name in names
                if name in self._manifest.tensors
            ]
        except StoreError as error:
            return error

    def _whole(self, name: str, read: Any) -> np.ndarray:
        """A tensor that was read completely, compared with its checksums."""
        label = f"tensor {name}"
        array = self._array(name, None, read, label)
        if bad := self._manifest.corrupt_chunks(name, array):
            which = f", chunks {bad}" if len(self._manifest.tensors[name].crc32) > 1 else ""
            advice = self._advice(name)
            raise StoreCorrupt(f"{label} in {self._path(name)} is corrupt: CRC-32 differs{which}. {advice}")
        return array

    def _checked(self, name: str, chunk: int, read: Any, label: str) -> np.ndarray:
        """One chunk of a tensor, compared with its checksum."""
        array = self._array(name, chunk, read, label)
        expected, found = self._manifest.tensors[name].crc32[chunk], checksum(array)
        if found != expected:
            raise StoreCorrupt(
                f"{label} in {self._path(name)} is corrupt: CRC-32 {found:08x}, expected {expected:08x}. "
                f"{self._advice(name, chunk)}"
            )
        return array

    def _array(self, name: str, chunk: int | None, read: Any, label: str) -> np.ndarray:
        try:
            return read.result()
        except ValueError as error:
            raise self._error(error, label, self._advice(name, chunk)) from error

    def _handle(self, name: str) -> tensorstore.TensorStore:
        """An opened tensor; it stays open, as opening costs as much as reading an expert."""
        if name not in self._handles:
            spec = {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": f"{self._path(name)}/"},
                "fill_missing_data_reads": False,  # a missing chunk is an error, not zeros
                "recheck_cached_metadata": False,
            }
            try:
                self._handles[name] = tensorstore.open(spec, open=True, read=True, context=self._context).result()
            except ValueError as error:
                raise self._error(error, f"tensor {name}", self._advice(name)) from error
        return self._handles[name]

    def _path(self, name: str) -> Path:
        return self.folder / "params" / "state" / name

    def _advice(self, name: str, chunk: int | None = None) -> str:
        """The way out for a tensor, or the expert with this chunk of it, that cannot be read: the model folder is to be
        made again where it is damaged as well, else the copy alone is."""
        source = source_of(self.folder)
        if source is None:
            return f"The model folder {self.folder} is damaged: make it again."
        try:
            HostStore.open(source)._check(name, chunk)
        except (StoreError, CheckpointError, ConfigError, OSError):
            return (
                f"The model folder {source}, which it was copied from, is damaged: make it again, then delete "
                f"{self.folder}."
            )
        return f"Delete {self.folder}; the next start copies it again from {source}."

    def _check(self, name: str, chunk: int | None) -> None:
        """Raises StoreMissing or StoreCorrupt unless a tensor, or one chunk of it, is whole."""
        if chunk is None:
            self.read(name)
            return
        experts = self._manifest.tensors[name].shape[1]
        read = self._handle(name)[chunk // experts, chunk % experts].read()
        self._checked(name, chunk, read, f"tensor {name}")

    @staticmethod
    def _error(error: ValueError, label: str, advice: str) -> StoreError:
        """tensorstore distinguishes absence from damage only by the status at the head of its message."""
        kind, what = (StoreMissing, "missing") if "NOT_FOUND" in str(error)[:40] else (StoreCorrupt, "corrupt")
        return kind(f"{label} is {what}: {str(error).split(' [')[0].strip()}. {advice}")


def _read_ahead(wanted: Iterable[tuple[Any, int, Any]]) -> Iterator[tuple[Any, Any]]:
    """Start the reads (key, bytes, start) in order, as many at once as `IN_FLIGHT` allows; yield key and read."""
    pending: collections.deque[tuple[Any, int, Any]] = collections.deque()
    for key, size, start in wanted:
        while pending and sum(each[1] for each in pending) + size > IN_FLIGHT:
            first = pending.popleft()
            yield first[0], first[2]
        pending.append((key, size, start()))
    for key, _, read in pending:
        yield key, read
