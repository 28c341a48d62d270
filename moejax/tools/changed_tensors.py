"""New weights that differ from a model folder in some tensors: which tensors it has, and the folder of the new weights.

    python -m moejax.tools.changed_tensors [--mtp] MODEL FORMAT HOW CONTENT [CHANGES TARGET]

MODEL, FORMAT and HOW are those of `moejax.tools.prepare`; CONTENT is the digest that it gave the model, which must have
the same one now. Without CHANGES one line of JSON on standard output: number format, shape and bytes of each tensor, by
the name that it has in the folder. With CHANGES, a folder with `data` and `tensors.json` (format, shape and first byte
in `data` of each changed tensor, by name), TARGET becomes a folder of the model with them: wholly, or not at all.

Of a published folder TARGET has links to the files whose tensors are in use, one new file with the changed tensors, and
an index. The parameters of a folder of ours are rewritten, through memory.

A process of its own, because the front of the server never imports JAX.
"""

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.checkpoint.checkpoint import load_params, write_params
from moejax.checkpoint.manifest import FILE, CheckpointError, Manifest, content_hash
from moejax.checkpoint.model_folder import CHANGED, MADE, PARAMS, changed_name, draft_folder
from moejax.checkpoint.published import published_name
from moejax.checkpoint.safetensors import DTYPES, INDEX, SafetensorsFolder
from moejax.config.model_config import ModelConfig
from moejax.config.params import named_tensors
from moejax.tools.prepare import BESIDE_STEPS, MTP, exit_status, prepared_folder
from moejax.tools.resolve import ensure_model, is_published, published_place

CHANGES = "changed.safetensors"
"""File of the changed tensors in the new folder of a published model."""
NAMES = {dtype.name: name for name, dtype in DTYPES.items()}
"""Names of number formats in safetensors, by their names in NumPy and ml_dtypes."""
PIECE = 16 << 20
"""Bytes that are copied at once."""


def base_folder(model: str, weights: str, how: str, content: str, *, mtp: bool = False) -> Path:
    """The folder that a model was prepared from. Raises CheckpointError unless its weights are still those of the
    digest `content`."""
    place = published_place(Path(model))
    if content_hash(prepared_folder(str(place), weights, how, mtp=mtp)) != content:
        raise CheckpointError(
            f"{model} holds other weights than those in force, which were read from it: its files have changed since. "
            "Send whole weights (apply weights --model), then changes of these."
        )
    return place if is_published(place) else ensure_model(model, mtp=mtp)


def tensor_types(base: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Number format, shape and bytes of each tensor of a folder."""
    if is_published(base):
        stored = SafetensorsFolder.open(base).stored
        types = {name: (DTYPES[each.dtype], each.shape) for name, each in stored.items()}
    else:
        tensors = Manifest.load(base).tensors
        types = {name: (jax.numpy.dtype(each.dtype), each.shape) for name, each in tensors.items()}
    return {name: (dtype.name, shape, math.prod(shape) * dtype.itemsize) for name, (dtype, shape) in types.items()}


def change(base: Path, changes: Path, target: Path) -> None:
    """Write the folder `target`: the model of `base` with the tensors in `changes`. Raises CheckpointError for a folder
    that is damaged."""
    given = json.loads((changes / "tensors.json").read_text())
    arrays = {
        name: _mapped(changes / "data", start, jax.numpy.dtype(dtype), tuple(shape))
        for name, (dtype, shape, start) in given.items()
    }
    published = is_published(base)
    name = changed_name(base) or (published_name(base) if published else ModelConfig.load(base).name)
    with draft_folder(target) as draft:
        (_change_published if published else _change_own)(base, arrays, draft)
        (draft / CHANGED).write_text(json.dumps({"name": name}))
        _flush(draft)


def _change_published(base: Path, arrays: Mapping[str, np.ndarray], draft: Path) -> None:
    _link_all(base, draft, (each for each in base.iterdir() if ".safetensors" not in each.name))
    kept = {name: each for name, each in SafetensorsFolder.open(base).stored.items() if name not in arrays}
    # A changed tensor of an earlier version moves on, so that no version needs the folder of another.
    earlier = {name: each for name, each in kept.items() if each.file.name == CHANGES}
    files = {each.file for name, each in kept.items() if name not in earlier}
    _link_all(base, draft, files)
    moved = {name: _mapped(each.file, each.start, DTYPES[each.dtype], each.shape) for name, each in earlier.items()}
    _write_safetensors(draft / CHANGES, {**moved, **arrays})
    places = {name: each.file.name for name, each in kept.items()} | dict.fromkeys(arrays, CHANGES)
    (draft / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict(sorted(places.items()))}, indent=1))


def _change_own(base: Path, arrays: Mapping[str, np.ndarray], draft: Path) -> None:
    _link_all(base, draft, (each for each in base.iterdir() if each.name not in (PARAMS, FILE)))
    cfg = ModelConfig.load(base)

    def leaf(path: Any, old: np.ndarray) -> np.ndarray:
        return np.asarray(arrays.get(jax.tree_util.keystr(path, simple=True, separator="."), old))

    params = jax.tree_util.tree_map_with_path(leaf, load_params(base, cfg, dtype=None))
    manifest = Manifest.of(named_tensors(params))
    manifest.check_config(cfg, draft)
    write_params(draft / PARAMS, params)
    (draft / FILE).write_text(manifest.to_json())


def _link_all(base: Path, draft: Path, places: Iterable[Path]) -> None:
    """Links to what the folder has, past the links of an earlier version."""
    for place in places:
        if place.name not in (CHANGED, MADE):
            (draft / place.name).symlink_to((base / place.name).resolve())


def _mapped(file: Path, start: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers at a place in a file, read when they are used."""
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return np.zeros(shape, dtype)
    if start + size > file.stat().st_size:
        raise CheckpointError(f"{file} has {file.stat().st_size} bytes, and a tensor ends at {start + size}.")
    return np.memmap(file, np.uint8, "r")[start : start + size].view(dtype).reshape(shape)


def _write_safetensors(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    header, at = {}, 0
    for name, array in arrays.items():
        offsets = [at, at := at + array.nbytes]
        header[name] = {"dtype": NAMES[array.dtype.name], "shape": array.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            numbers = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            for first in range(0, len(numbers), PIECE):
                opened.write(numbers[first : first + PIECE].data)


def _flush(folder: Path) -> None:
    """Have the disk write what is new in a folder: the record of a version must not outlive its weights."""
    for place in (folder, *folder.rglob("*")):
        if not place.is_symlink():
            descriptor = os.open(place, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def main() -> int:
    """Do what the command line says; the exit status is 1 with one line of cause when that cannot be."""
    os.nice(BESIDE_STEPS)
    model, weights, how, content, *places = (each for each in sys.argv[1:] if each != MTP)

    def work() -> None:
        base = base_folder(model, weights, how, content, mtp=MTP in sys.argv)
        if places:
            changes, target = map(Path, places)
            change(base, changes, target)
        else:
            print(json.dumps(tensor_types(base)))

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
