"""A published folder as a store: each rank reads the bytes it needs from the safetensors, dequantised on
reading, and no weight is written anywhere.

    record_checksums(source, target, on_progress=report)   once: reads every number and records its checksum in `target`
    store = PublishedStore.open(target)

The host's copy is the kernel's page cache of the files. Orbax can read safetensors too, but as it reads all
else: by a sharding over live devices, meeting all processes (`moejax.checkpoint.host_store` says why recovery cannot).
"""

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from moejax.checkpoint.checksums import EXPERT_PARTS, ChecksummedWeights, aligned_array, params_without_experts
from moejax.checkpoint.errors import Expert, StoreCorrupt, StoreError, StoreMissing
from moejax.checkpoint.families import array_sources, read_config
from moejax.checkpoint.families.source import ArraySource
from moejax.checkpoint.host_store import HostStore
from moejax.checkpoint.manifest import FILE, CheckpointError, Manifest, checksum, expert_position
from moejax.checkpoint.model_folder import replace_folder
from moejax.checkpoint.published import (
    array_key,
    copy_tokenizer,
    fingerprint,
    has_int4_experts,
    manifest_of,
    open_published,
    read_array,
    stored_dtypes,
)
from moejax.checkpoint.safetensors import SafetensorsFolder
from moejax.config import int4
from moejax.config.model_config import ModelConfig
from moejax.config.params import Params, is_expert

SOURCE = "published.json"
"""File that names the published folder of the checksums beside it, with its fingerprint."""
INT4_EXPERTS = "int4_experts"
"""Its field that says whether ranks can hold the experts in int4 as they are published."""


def record_checksums(
    source: Path, target: Path, *, name: str, on_progress: Callable[[int, int], None], mtp: bool = False
) -> None:
    """Read every number of a published folder once, and write configuration, checksums and tokenizer to the folder
    `target`; with `mtp` also those of the layer of multi-token prediction. `on_progress` is called with the bytes done
    and the total bytes.

    Raises ConfigError or CheckpointError, before any weight is read, for what `open_published` checks.
    """
    source = Path(source).absolute()
    cfg, weights = open_published(source, name, mtp=mtp)
    dtypes = stored_dtypes(cfg, weights, None)
    about: dict[str, Any] = {"folder": str(source), "fingerprint": fingerprint(source, cfg, None)}
    int4_experts = has_int4_experts(cfg, weights)
    entries = list(array_sources(cfg))
    total = sum(math.prod(entry.shape) * dtypes[entry.path].itemsize for entry in entries)
    checksums, done = {}, 0
    for entry in entries:
        array = read_array(entry, weights, dtypes[entry.path])
        if int4_experts and is_expert(entry.path) and array.ndim == 2:
            int4_experts = int4.is_exact(read_array(entry, weights, np.dtype(np.float32), exactly=True))
        checksums[array_key(entry)] = checksum(array)
        done += array.nbytes
        on_progress(done, total)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        copy_tokenizer(source, draft)
        (draft / FILE).write_text(manifest_of(cfg, dtypes, checksums).to_json())
        (draft / "config.json").write_text(cfg.to_json() + "\n")
        (draft / SOURCE).write_text(json.dumps(about | {INT4_EXPERTS: int4_experts}))
        replace_folder(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


class PublishedStore(ChecksummedWeights):
    """Reads the weights of one model out of its published folder, each compared with its checksum."""

    def __init__(self, folder: Path, cfg: ModelConfig, manifest: Manifest, weights: SafetensorsFolder) -> None:
        super().__init__(cfg, manifest)
        self.folder = folder
        self.int4_experts = False
        """True where ranks can hold the experts in int4 as they are published."""
        self._exactly = False
        self._weights = weights
        self._entries: dict[tuple[str, int | None, int | None], ArraySource] = {
            (entry.path, entry.repeat, entry.expert): entry for entry in array_sources(cfg)
        }

    @classmethod
    def open(cls, folder: Path, *, exactly: bool = False) -> "PublishedStore":
        """The store that `record_checksums` made in a folder. With `exactly`, experts published in int4 are read in
        float32, not rounded to the format of their scales.

        Raises CheckpointError when the published folder is not what it was then.
        """
        folder = Path(folder)
        cfg, manifest = ModelConfig.load(folder), Manifest.load(folder)
        manifest.check_config(cfg, folder)
        about = json.loads((folder / SOURCE).read_text())
        source = Path(about["folder"])
        if fingerprint(source, read_config(source, name=cfg.name, mtp=cfg.mtp), None) != about["fingerprint"]:
            raise CheckpointError(f"{source} has changed since its checksums were recorded in {folder}. Start again.")
        store = cls(folder, cfg, manifest, SafetensorsFolder.open(source))
        store.int4_experts = about.get(INT4_EXPERTS, False)
        store._exactly = exactly and store.int4_experts
        return store

    def non_expert_params(self, dtype: Any = np.float32) -> Params:
        """As `HostStore.non_expert_params`; memory is that of the parameters and of one array."""
        arrays: dict[str, np.ndarray] = {}
        for (path, repeat, _), entry in self._entries.items():
            if is_expert(path):
                continue
            if repeat is None:
                arrays[path] = aligned_array(self._read(entry), np.dtype(dtype))
                continue
            if path not in arrays:
                arrays[path] = aligned_array(np.empty(self._manifest.tensors[path].shape, dtype), np.dtype(dtype))
            arrays[path][repeat] = self._read(entry)
        return params_without_experts(self.cfg, arrays)

    def read_experts(self, wanted: Iterable[Expert], dtype: Any = np.float32) -> dict[Expert, tuple[np.ndarray, ...]]:
        """As `HostStore.read_experts`, one after the other: only their bytes."""
        found: dict[Expert, tuple[np.ndarray, ...]] = {}
        failed: dict[Expert, StoreError] = {}
        for expert in wanted:
            try:
                found[expert] = tuple(self._read(e).astype(dtype, copy=False) for e in self._entries_of(expert))
            except StoreError as error:
                failed[expert] = error
        if failed:
            first = next(iter(failed.values()))
            raise type(first)(str(first), failed)
        return found

    def _entries_of(self, expert: Expert) -> list[ArraySource]:
        segment, position, repeat = expert_position(self.cfg, expert[0])
        names = [f"segments.{segment}.{position}.moe.experts.{part}" for part in EXPERT_PARTS]
        experts = self._manifest.tensors[names[0]].shape[1]
        if not 0 <= expert[1] < experts:
            raise StoreMissing(f"{self.cfg.name} has no expert {expert[1]} in MoE layer {expert[0]}: it has {experts}.")
        return [self._entries[name, repeat, expert[1]] for name in names if name in self._manifest.tensors]

    def _read(self, entry: ArraySource) -> np.ndarray:
        """One array as it is stored, compared with its checksum, which is that of the rounded numbers in any case."""
        tensor = self._manifest.tensors[entry.path]
        files = sorted({str(self._weights.file(each.name)) for each in entry.tensors})
        label = f"{entry.path} (repeat {entry.repeat}, expert {entry.expert})"
        try:
            exactly = self._exactly and is_expert(entry.path)
            array = read_array(entry, self._weights, np.dtype(np.float32 if exactly else tensor.dtype), exactly=exactly)
        except CheckpointError as error:
            if gone := [file for file in files if not Path(file).is_file()]:
                raise StoreMissing(f"{label} is missing: {gone[0]} is not there any more.") from error
            raise StoreCorrupt(f"{label} is corrupt: {error}") from error
        rounded = array.astype(np.dtype(tensor.dtype), copy=False)
        expected, found = tensor.crc32[self._chunk(entry)], checksum(rounded)
        if found != expected:
            where = " and ".join(files)
            raise StoreCorrupt(f"{label} in {where} is corrupt: CRC-32 {found:08x}, expected {expected:08x}.")
        return array

    def _chunk(self, entry: ArraySource) -> int:
        shape = self._manifest.tensors[entry.path].shape
        if entry.expert is not None:
            assert entry.repeat is not None
            return entry.repeat * shape[1] + entry.expert
        return entry.repeat or 0


def open_store(folder: Path, *, exactly: bool = False) -> HostStore | PublishedStore:
    """The store in a folder: PublishedStore where checksums of a published folder are, else HostStore."""
    is_published = (Path(folder) / SOURCE).is_file()
    return PublishedStore.open(folder, exactly=exactly) if is_published else HostStore.open(folder)
