"""A published folder read where it lies: each rank takes the bytes it needs out of the safetensors, widened on the way
where they are quantised, and no weight is written anywhere.

    note_published(source, place, say=say)      once: every number is read, and its checksum noted in `place`
    store = PublishedStore.open(place)

The host's copy is what the kernel keeps of the files in memory. Orbax can read safetensors too, but as it reads all
else: by a sharding over live devices, meeting all processes (`moejax.store` says why recovery cannot).
"""

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np

from moejax.checkpoint import replace_folder
from moejax.config import ModelConfig
from moejax.families import read_config, tensor_names
from moejax.families.source import Entry
from moejax.known_weights import PARTS, KnownWeights, aligned, without_experts
from moejax.manifest import FILE, CheckpointError, Manifest, checksum, expert_place, is_expert
from moejax.params import Params
from moejax.published import (
    array_key,
    copy_tokenizer,
    fingerprint,
    manifest_of,
    open_published,
    read_array,
    stored_dtypes,
)
from moejax.safetensors_folder import SafetensorsFolder
from moejax.store import HostStore
from moejax.store_errors import Expert, StoreCorrupt, StoreError, StoreMissing

SOURCE = "published.json"
"""Which folder the checksums beside it are of, and in which state."""


def note_published(source: Path, place: Path, *, name: str, say: Callable[[int, int], None]) -> None:
    """Read every number of a published folder once, and note in the folder `place` what it is: configuration,
    checksums, tokenizer. `say` is told the bytes done and the bytes of all.

    Raises ConfigError or CheckpointError, before any weight is read, for what `open_published` checks.
    """
    source = Path(source).absolute()
    cfg, weights = open_published(source, name)
    dtypes = stored_dtypes(cfg, weights, None)
    about = {"folder": str(source), "fingerprint": fingerprint(source, cfg, None)}
    entries = list(tensor_names(cfg))
    total = sum(math.prod(entry.shape) * dtypes[entry.path].itemsize for entry in entries)
    checksums, done = {}, 0
    for entry in entries:
        array = read_array(entry, weights, dtypes[entry.path])
        checksums[array_key(entry)] = checksum(array)
        done += array.nbytes
        say(done, total)
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        copy_tokenizer(source, draft)
        (draft / FILE).write_text(manifest_of(cfg, dtypes, checksums).to_json())
        (draft / "config.json").write_text(cfg.to_json() + "\n")
        (draft / SOURCE).write_text(json.dumps(about))
        replace_folder(draft, place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


class PublishedStore(KnownWeights):
    """Reads the weights of one model out of its published folder, each compared with its checksum."""

    def __init__(self, folder: Path, cfg: ModelConfig, manifest: Manifest, weights: SafetensorsFolder) -> None:
        super().__init__(cfg, manifest)
        self.folder = folder
        self._weights = weights
        self._entries: dict[tuple[str, int | None, int | None], Entry] = {
            (entry.path, entry.repeat, entry.expert): entry for entry in tensor_names(cfg)
        }

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The store that `note_published` made in a folder.

        Raises CheckpointError when the published folder is not what it was then.
        """
        folder = Path(folder)
        cfg, manifest = ModelConfig.load(folder), Manifest.load(folder)
        manifest.check_config(cfg, folder)
        about = json.loads((folder / SOURCE).read_text())
        source = Path(about["folder"])
        if fingerprint(source, read_config(source, name=cfg.name), None) != about["fingerprint"]:
            raise CheckpointError(f"{source} has changed since its checksums were noted in {folder}. Start again.")
        return cls(folder, cfg, manifest, SafetensorsFolder.open(source))

    def everything_but_experts(self, dtype: Any = np.float32) -> Params:
        """As `HostStore.everything_but_experts`; memory is that of the parameters and of one array."""
        arrays: dict[str, np.ndarray] = {}
        for (path, repeat, _), entry in self._entries.items():
            if is_expert(path):
                continue
            if repeat is None:
                arrays[path] = aligned(self._read(entry), np.dtype(dtype))
                continue
            if path not in arrays:
                arrays[path] = aligned(np.empty(self._manifest.tensors[path].shape, dtype), np.dtype(dtype))
            arrays[path][repeat] = self._read(entry)
        return without_experts(self.cfg, arrays)

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

    def _entries_of(self, expert: Expert) -> list[Entry]:
        segment, position, repeat = expert_place(self.cfg, expert[0])
        names = [f"segments.{segment}.{position}.moe.experts.{part}" for part in PARTS]
        experts = self._manifest.tensors[names[0]].shape[1]
        if not 0 <= expert[1] < experts:
            raise StoreMissing(f"{self.cfg.name} has no expert {expert[1]} in MoE layer {expert[0]}: it has {experts}.")
        return [self._entries[name, repeat, expert[1]] for name in names if name in self._manifest.tensors]

    def _read(self, entry: Entry) -> np.ndarray:
        """One array as it is stored, compared with its checksum."""
        tensor = self._manifest.tensors[entry.path]
        files = sorted({str(self._weights.file(each.name)) for each in entry.tensors})
        label = f"{entry.path} (repeat {entry.repeat}, expert {entry.expert})"
        try:
            array = read_array(entry, self._weights, np.dtype(tensor.dtype))
        except CheckpointError as error:
            if gone := [file for file in files if not Path(file).is_file()]:
                raise StoreMissing(f"{label} is missing: {gone[0]} is not there any more.") from error
            raise StoreCorrupt(f"{label} is corrupt: {error}") from error
        expected, found = tensor.crc32[self._chunk(entry)], checksum(array)
        if found != expected:
            where = " and ".join(files)
            raise StoreCorrupt(f"{label} in {where} is corrupt: CRC-32 {found:08x}, expected {expected:08x}.")
        return array

    def _chunk(self, entry: Entry) -> int:
        shape = self._manifest.tensors[entry.path].shape
        if entry.expert is not None:
            assert entry.repeat is not None
            return entry.repeat * shape[1] + entry.expert
        return entry.repeat or 0


def open_store(folder: Path) -> HostStore | PublishedStore:
    """The store in a folder, whichever it is."""
    return PublishedStore.open(folder) if (Path(folder) / SOURCE).is_file() else HostStore.open(folder)
