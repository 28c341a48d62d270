"""A published folder as a store: each rank reads the bytes it needs from the safetensors, dequantised on
reading, and no weight is written anywhere.

    record_checksums(source, target, on_progress=report)   once: reads every number and records its checksum in `target`
    store = PublishedStore.open(target)

The host's copy is the kernel's page cache of the files. Orbax can read safetensors too, but as it reads all
else: by a sharding over live devices, meeting all processes (`moejax.checkpoint.host_store` says why recovery cannot).
"""

import dataclasses
import json
import math
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
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
    manifest_of,
    open_published,
    packed_form,
    read_array,
    read_packed,
    stored_dtypes,
)
from moejax.checkpoint.safetensors import SafetensorsFolder
from moejax.config.config_values import build_config
from moejax.config.model_config import ModelConfig
from moejax.config.packed_form import PackedForm, part_of
from moejax.config.params import Params, is_expert, tensor_specs
from moejax.config.weight_formats import Quantized, packed_shape

SOURCE = "published.json"
"""File that names the published folder of the checksums beside it, with its fingerprint."""
RECORD = 3
"""Version of what lies beside it. Raise it when the bits that ranks hold change, so that checksums are taken again."""
PACKED = "packed"
"""Its field with the form in which ranks can hold matrices as they are published; null where there is none."""
PACKED_CHECKSUMS = "packed_checksums"
"""Its field with the checksums of these matrices in that form."""


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
    form, specs = packed_form(cfg, weights), tensor_specs(cfg)
    entries = list(array_sources(cfg))
    total = sum(math.prod(entry.shape) * dtypes[entry.path].itemsize for entry in entries)
    checksums, packed_checksums, done = {}, {}, 0
    for entry in entries:
        array = read_array(entry, weights, dtypes[entry.path])
        checksums[array_key(entry)] = checksum(array)
        axes = specs[entry.path].axes
        if form is not None and part_of(axes) in form.parts:
            packed = read_packed(entry, weights, form)
            if packed is None:
                form = form.without_part(part_of(axes))
            else:
                packed_checksums[array_key(entry)] = _packed_checksum(packed)
        done += array.nbytes
        on_progress(done, total)
    about |= {PACKED: None if form is None else dataclasses.asdict(form), PACKED_CHECKSUMS: packed_checksums}
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        copy_tokenizer(source, draft)
        (draft / FILE).write_text(manifest_of(cfg, dtypes, checksums).to_json())
        (draft / "config.json").write_text(cfg.to_json() + "\n")
        (draft / SOURCE).write_text(json.dumps(about))
        replace_folder(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


class PublishedStore(ChecksummedWeights):
    """Reads the weights of one model out of its published folder, each compared with its checksum."""

    def __init__(self, folder: Path, cfg: ModelConfig, manifest: Manifest, weights: SafetensorsFolder) -> None:
        super().__init__(cfg, manifest)
        self.folder = folder
        self.packed: PackedForm | None = None
        """The form in which ranks can hold matrices as they are published."""
        self._parts: tuple[str, ...] = ()
        """The parts that are read in that form."""
        self._packed_checksums: dict[str, int] = {}
        self._specs = tensor_specs(cfg)
        self._weights = weights
        self._entries: dict[tuple[str, int | None, int | None], ArraySource] = {
            (entry.path, entry.repeat, entry.expert): entry for entry in array_sources(cfg)
        }

    @classmethod
    def open(cls, folder: Path, *, held: PackedForm | None = None) -> "PublishedStore":
        """The store that `record_checksums` made in a folder. With `held`, the matrices of its parts are read in the
        bits in which they are published.

        Raises CheckpointError when the published folder is not what it was then, or not in that form.
        """
        folder = Path(folder)
        cfg, manifest = ModelConfig.load(folder), Manifest.load(folder)
        manifest.check_config(cfg, folder)
        about = json.loads((folder / SOURCE).read_text())
        source = Path(about["folder"])
        if fingerprint(source, read_config(source, name=cfg.name, mtp=cfg.mtp), None) != about["fingerprint"]:
            raise CheckpointError(f"{source} has changed since its checksums were recorded in {folder}. Start again.")
        store = cls(folder, cfg, manifest, SafetensorsFolder.open(source))
        store.packed = recorded_form(folder)
        if held is not None:
            store._hold(held, about[PACKED_CHECKSUMS])
        return store

    def _hold(self, held: PackedForm, checksums: dict[str, int]) -> None:
        """Read the parts of this form in it from now on."""
        found = self.packed
        if found is None or found.of(held.parts) != held:
            raise CheckpointError(f"{self.folder} has weights in the form {found}, and ranks hold {held}.")
        self._parts, self._packed_checksums = held.parts, checksums

    def non_expert_params(self, dtype: Any = np.float32) -> Params:
        """As `HostStore.non_expert_params`; memory is that of the parameters and of one array."""
        arrays: dict[str, Any] = {}
        for (path, repeat, _), entry in self._entries.items():
            if is_expert(path):
                continue
            if repeat is None:
                read = self._read(entry)
                arrays[path] = read if isinstance(read, Quantized) else aligned_array(read, np.dtype(dtype))
                continue
            if path not in arrays:
                arrays[path] = self._room(path, np.dtype(dtype))
            jax.tree.map(lambda room, part, at=repeat: room.__setitem__(at, part), arrays[path], self._read(entry))
        return params_without_experts(self.cfg, arrays)

    def _room(self, path: str, dtype: np.dtype) -> Any:
        """Space for all repeats of a tensor."""
        spec = self._specs[path]
        if self.packed is None or part_of(spec.axes) not in self._parts:
            return aligned_array(np.empty(spec.shape, dtype), dtype)
        return jax.tree.map(
            lambda s: aligned_array(np.empty(s.shape, s.dtype), np.dtype(s.dtype)),
            packed_shape(spec.shape, self.packed),
        )

    def read_experts(self, wanted: Iterable[Expert], dtype: Any = np.float32) -> dict[Expert, tuple[Any, ...]]:
        """As `HostStore.read_experts`, one after the other: only their bytes. Matrices that are held as published are
        `Quantized`."""
        found: dict[Expert, tuple[Any, ...]] = {}
        failed: dict[Expert, StoreError] = {}
        for expert in wanted:
            try:
                found[expert] = tuple(self._read_as(e, dtype) for e in self._entries_of(expert))
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

    def _read_as(self, entry: ArraySource, dtype: Any) -> np.ndarray | Quantized:
        found = self._read(entry)
        return found if isinstance(found, Quantized) else found.astype(dtype, copy=False)

    def _read(self, entry: ArraySource) -> np.ndarray | Quantized:
        """One array as it is stored, or is held as published, compared with its checksum."""
        files = sorted({str(self._weights.file(each.name)) for each in entry.tensors})
        label = f"{entry.path} (repeat {entry.repeat}, expert {entry.expert})"
        try:
            if self.packed is not None and part_of(self._specs[entry.path].axes) in self._parts:
                array = read_packed(entry, self._weights, self.packed)
                expected = self._packed_checksums[array_key(entry)]
                found = None if array is None else _packed_checksum(array)
            else:
                tensor = self._manifest.tensors[entry.path]
                array = read_array(entry, self._weights, np.dtype(tensor.dtype))
                expected, found = tensor.crc32[self._chunk(entry)], checksum(array)
        except CheckpointError as error:
            if gone := [file for file in files if not Path(file).is_file()]:
                raise StoreMissing(f"{label} is missing: {gone[0]} is not there any more.") from error
            raise StoreCorrupt(f"{label} is corrupt: {error}") from error
        if array is None or found != expected:
            where, held = " and ".join(files), "its scales" if found is None else f"CRC-32 {found:08x}"
            raise StoreCorrupt(f"{label} in {where} is corrupt: {held}, expected {expected:08x}.")
        return array

    def _chunk(self, entry: ArraySource) -> int:
        shape = self._manifest.tensors[entry.path].shape
        if entry.expert is not None:
            assert entry.repeat is not None
            return entry.repeat * shape[1] + entry.expert
        return entry.repeat or 0


def recorded_form(folder: Path) -> PackedForm | None:
    """The form in which ranks can hold the model of the checksums in a folder; None where there is none, and for a
    folder without checksums of a published one."""
    path = Path(folder) / SOURCE
    packed = json.loads(path.read_text()).get(PACKED) if path.is_file() else None
    return None if packed is None else build_config(PackedForm, packed, PACKED)


def open_store(folder: Path, *, held: PackedForm | None = None) -> HostStore | PublishedStore:
    """The store in a folder: PublishedStore where checksums of a published folder are, else HostStore. Raises as
    `PublishedStore.open`."""
    if (Path(folder) / SOURCE).is_file():
        return PublishedStore.open(folder, held=held)
    if held is not None:
        raise CheckpointError(f"{folder} is not read as it was published, and ranks hold {held}.")
    return HostStore.open(folder)


def _packed_checksum(weight: Quantized) -> int:
    """One checksum of all arrays of a matrix."""
    found = 0
    for leaf in jax.tree.leaves(weight):
        found = zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8).data, found)
    return found
