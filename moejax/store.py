"""The host's copy of a model's weights: what a rank reads at the start, and a lost expert in recovery.

It is the Orbax checkpoint of a model folder, normally in tmpfs, where it outlives any rank. Recovery reads
single experts from it while other processes are dead. Orbax cannot do that: its restore places arrays by a
sharding over live devices, initialises JAX's backends and meets all processes at barriers. So tensorstore,
Orbax's own storage layer, is used directly. No barrier, no lock, no JAX backend: any number of processes read
at once, also before `jax.distributed` is up.
"""

import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import tensorstore

from moejax.config import ModelConfig
from moejax.manifest import FILE, CheckpointError, Manifest, checksum, content_hash, expert_place, is_expert
from moejax.params import Params, is_spec, param_specs

TMPFS = Path("/dev/shm")
WAY_OUT = "Delete the folder; it is copied anew from the model at the next start."
Expert = tuple[int, int]
"""(MoE layer, counted by depth among MoE layers; logical expert)."""


class StoreError(RuntimeError):
    """Weights that cannot be had from the host's copy.

    `failed` holds one error for every expert of the call that could not be read; the others can.
    """

    def __init__(self, message: str, failed: "dict[Expert, StoreError] | None" = None) -> None:
        super().__init__(message)
        self.failed: dict[Expert, StoreError] = failed or {}


class StoreMissing(StoreError):
    """The store has no such weights: the file is not there."""


class StoreCorrupt(StoreError):
    """The store has other weights than were written: truncated, damaged, or a checksum that differs."""


class StoreRefused(StoreError):
    """A folder that others could have written to."""


class HostStore:
    """Reads the weights of one model. `cfg` and `folder` say which and where from."""

    def __init__(self, folder: Path, cfg: ModelConfig, manifest: Manifest) -> None:
        self.folder = folder
        self.cfg = cfg
        self._manifest = manifest
        self._handles: dict[str, tensorstore.TensorStore] = {}
        self._context = tensorstore.Context({"file_io_concurrency": {"limit": 8}})

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The store in a folder made by `create`, or straight in a model folder.

        Raises CheckpointError or ConfigError when its description is not readable or not of one model.
        """
        folder = Path(folder)
        cfg, manifest = ModelConfig.load(folder), Manifest.load(folder)
        manifest.check_config(cfg, folder)
        return cls(folder, cfg, manifest)

    @classmethod
    def create(cls, model_folder: Path, place: Path | None = None) -> Self:
        """Copy a model's weights to the host's memory, once: a second call finds the copy.

        `place` is /dev/shm/moejax-<uid>/<model>-<content hash> unless given; only this user may read it.
        Without room in tmpfs the model folder itself is the store, with a warning. The copy stays until it is
        deleted or the host restarts. Raises StoreRefused for a folder of another owner.
        """
        model_folder = Path(model_folder)
        if place is None:
            name = ModelConfig.load(model_folder).name
            place = TMPFS / f"moejax-{os.getuid()}" / f"{name}-{content_hash(model_folder)}"
        if not place.parent.parent.is_dir():
            warnings.warn(f"{place.parent.parent} does not exist; reading {model_folder}.", stacklevel=2)
            return cls.open(model_folder)
        _private(place.parent)
        sizes = _sizes(model_folder)
        if place.is_dir() and _sizes(place) == sizes:
            return cls.open(place)
        free, needed = shutil.disk_usage(place.parent).free, sum(sizes.values())
        if free < needed:
            warnings.warn(
                f"{place.parent} has {free >> 20} MiB free, the weights need {needed >> 20} MiB; reading "
                f"{model_folder}, so experts will be recovered at the speed of that disk.",
                stacklevel=2,
            )
            return cls.open(model_folder)
        _copy(model_folder, place, list(sizes))
        return cls.open(place)

    def everything_but_experts(self, dtype: Any = np.float32) -> Params:
        """All parameters as NumPy arrays except the routed experts, which are `FeedForward(None, None)`.

        Raises StoreMissing or StoreCorrupt.
        """
        names = [n for n in self._manifest.tensors if not is_expert(n)]
        reads = {n: self._handle(n).read() for n in names}

        def leaf(path: Any, _: Any) -> np.ndarray | None:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            if is_expert(name):
                return None
            return self._checked(name, 0, reads[name], f"tensor {name}").astype(dtype, copy=False)

        return jax.tree_util.tree_map_with_path(leaf, param_specs(self.cfg), is_leaf=is_spec)

    def read_experts(
        self, wanted: Iterable[Expert], dtype: Any = np.float32
    ) -> dict[Expert, tuple[np.ndarray, np.ndarray]]:
        """Gate-up `[2F, D]` and down `[D, F]` of the wanted experts: only their bytes, all reads at once.

        Raises StoreMissing or StoreCorrupt for the first that fails; its `failed` names all that do.
        """
        reads: dict[Expert, list[tuple[str, int, Any]]] = {}
        failed: dict[Expert, StoreError] = {}
        for expert in wanted:
            try:
                reads[expert] = [self._start_read(expert, part) for part in ("gate_up", "down")]
            except StoreError as error:
                failed[expert] = error
        found = {}
        for expert, parts in reads.items():
            label = f"expert {expert[1]} of MoE layer {expert[0]}"
            try:
                gate_up, down = (self._checked(*p, label).astype(dtype, copy=False) for p in parts)
            except StoreError as error:
                failed[expert] = error
            else:
                found[expert] = (gate_up, down)
        if failed:
            first = next(iter(failed.values()))
            raise type(first)(str(first), failed)
        return found

    def _start_read(self, expert: Expert, part: str) -> tuple[str, int, Any]:
        """The tensor, the chunk number in it and the read in flight of one half of an expert."""
        segment, position, repeat = expert_place(self.cfg, expert[0])
        name = f"segments.{segment}.{position}.moe.experts.{part}"
        experts = self._manifest.tensors[name].shape[1]
        if not 0 <= expert[1] < experts:
            raise StoreMissing(f"{self.cfg.name} has no expert {expert[1]} in MoE layer {expert[0]}: it has {experts}.")
        return name, repeat * experts + expert[1], self._handle(name)[repeat, expert[1]].read()

    def _checked(self, name: str, chunk: int, read: Any, label: str) -> np.ndarray:
        """The array of a finished read, compared with its checksum."""
        try:
            array = read.result()
        except ValueError as error:
            raise self._error(error, label) from error
        expected, found = self._manifest.tensors[name].crc32[chunk], checksum(array)
        if found != expected:
            raise StoreCorrupt(
                f"{label} in {self._path(name)} is corrupt: CRC-32 {found:08x}, expected {expected:08x}. " + WAY_OUT
            )
        return array

    def _handle(self, name: str) -> tensorstore.TensorStore:
        """An opened tensor, kept: opening costs as much as reading an expert."""
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
                raise self._error(error, f"tensor {name}") from error
        return self._handles[name]

    def _path(self, name: str) -> Path:
        return self.folder / "params" / "state" / name

    @staticmethod
    def _error(error: ValueError, label: str) -> StoreError:
        """tensorstore tells absence from damage only by the status at the head of its message."""
        kind, what = (StoreMissing, "missing") if "NOT_FOUND" in str(error)[:40] else (StoreCorrupt, "corrupt")
        return kind(f"{label} is {what}: {str(error).split(' [')[0].strip()}. {WAY_OUT}")


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file the store needs, by path within the model folder."""
    files = [folder / "config.json", folder / FILE, *sorted((folder / "params").rglob("*"))]
    return {str(f.relative_to(folder)): f.stat().st_size for f in files if f.is_file()}


def _private(folder: Path) -> None:
    """Make a folder for this user alone, or raise StoreRefused when another could have put files in it."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise StoreRefused(
            f"{folder} has owner {found.st_uid} and mode {stat.filemode(found.st_mode)}; it must be a "
            f"folder of user {os.getuid()} with mode drwx------. Delete it, or give another place."
        )


def _copy(model_folder: Path, place: Path, files: list[str]) -> None:
    """Copy into a draft and rename: another process sees all of it or nothing."""
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=place.parent))
    try:
        for file in files:
            (draft / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(model_folder / file, draft / file)
        if place.is_dir():
            os.rename(place, draft / "damaged")
        os.rename(draft, place)
        shutil.rmtree(place / "damaged", ignore_errors=True)
    except OSError as error:
        if not place.is_dir():
            raise CheckpointError(f"{model_folder} cannot be copied to {place}: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
