"""From a published model folder (safetensors) to ours: one array at a time, and on from where it was stopped.

    python -m moejax.convert SRC DST [--dtype float32]

The draft lies beside the target as `.NAME.converting`. Every finished chunk is noted in its journal, so a run that
was killed is taken up by the next; a draft of other files is thrown away. Only a whole folder gets the target's name.
"""

import argparse
import collections
import contextlib
import dataclasses
import fcntl
import itertools
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import tensorstore
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moejax.checkpoint import PARAMS, replace_folder, write_skeleton
from moejax.config import ModelConfig
from moejax.families import tensor_names
from moejax.families.source import Entry
from moejax.manifest import FILE, CheckpointError, checksum, tensor_specs
from moejax.published import (
    DTYPES,
    array_key,
    copy_tokenizer,
    fingerprint,
    manifest_of,
    open_published,
    read_array,
    stored_dtypes,
)
from moejax.safetensors_folder import SafetensorsFolder

JOURNAL = "journal.jsonl"
IN_FLIGHT = 256 << 20
"""Bytes being written while the next array is read; one array may be more."""

Say = Callable[[int, int], None]
"""Told the bytes done and the bytes of all."""


def convert(source: Path, target: Path, *, name: str | None = None, dtype: str | None = None, say: Say) -> ModelConfig:
    """Write the model folder `target` from the published folder `source`, replacing what was there.

    `dtype` is what weights are stored as; None keeps the published one (bfloat16 for float8 and MXFP4). Memory is
    that of the largest tensor, not of the model. Raises ConfigError or CheckpointError, before anything is written,
    for an architecture that is not served and for tensors that are missing, cut short, or of another shape.
    """
    source, target = Path(source), Path(target)
    cfg, weights = open_published(source, name)
    dtypes = stored_dtypes(cfg, weights, dtype)
    draft = target.parent / f".{target.name}.converting"
    target.parent.mkdir(parents=True, exist_ok=True)
    of = fingerprint(source, cfg, dtype)
    with _alone(draft):
        draft.mkdir(exist_ok=True)
        _check_room(draft, cfg, dtypes)
        with _Journal(draft, of) as journal:
            _write_arrays(draft / PARAMS, cfg, weights, dtypes, journal, say)
            manifest = manifest_of(cfg, dtypes, journal.checksums)
        manifest.check_config(cfg, draft)
        write_skeleton(draft / PARAMS, cfg)
        copy_tokenizer(source, draft)
        (draft / FILE).write_text(manifest.to_json())
        (draft / "config.json").write_text(cfg.to_json() + "\n")
        (draft / JOURNAL).unlink()
        replace_folder(draft, target)
    return cfg


def _write_arrays(
    params: Path,
    cfg: ModelConfig,
    weights: SafetensorsFolder,
    dtypes: dict[str, np.dtype],
    journal: "_Journal",
    say: Say,
) -> None:
    specs = tensor_specs(cfg)
    total = sum(spec.size * dtypes[path].itemsize for path, spec in specs.items())
    done = 0
    context = tensorstore.Context({"file_io_concurrency": {"limit": 4}})
    flying: collections.deque[tuple[Any, str, int, int]] = collections.deque()

    def land() -> None:
        write, key, crc, _ = flying.popleft()
        write.result()
        journal.note(key, crc)

    for path, entries in itertools.groupby(tensor_names(cfg), key=lambda entry: entry.path):
        leaf = None
        for entry in entries:
            size = int(np.prod(entry.shape, dtype=np.int64)) * dtypes[path].itemsize
            if array_key(entry) not in journal.checksums or not _is_whole(params, entry, len(specs[path].shape), size):
                if leaf is None:
                    shape = specs[path].shape
                    leaf = open_leaf(params, path, shape, len(shape) - len(entry.shape), dtypes[path], context)
                array = np.ascontiguousarray(read_array(entry, weights, dtypes[path]))
                place = tuple(i for i in (entry.repeat, entry.expert) if i is not None)
                while flying and (flying[0][0].done() or sum(f[3] for f in flying) + size > IN_FLIGHT):
                    land()
                flying.append((leaf[place].write(array), array_key(entry), checksum(array), size))
            done += size
            say(done, total)
    while flying:
        land()


def _is_whole(params: Path, entry: Entry, axes: int, size: int) -> bool:
    """True if the chunk of an array is on disk: a power cut may have taken it back."""
    place = [i for i in (entry.repeat, entry.expert) if i is not None]
    file = params.joinpath("state", entry.path, "c", *map(str, place + [0] * (axes - len(place))))
    return file.is_file() and file.stat().st_size == size


def open_leaf(
    params: Path, name: str, shape: tuple[int, ...], chunked: int, dtype: np.dtype, context: tensorstore.Context
) -> tensorstore.TensorStore:
    """The array of tensor `name` on disk, made if need be, as Orbax lays it out: one chunk for each place in the first
    `chunked` axes, which are repeat and expert."""
    chunk = [1] * chunked + list(shape[chunked:])
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{params / 'state' / name}/"},
        "metadata": {
            "shape": list(shape),
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "data_type": dtype.name,
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        },
        "store_data_equal_to_fill_value": True,  # a chunk that is not there is damage, never zeros
    }
    return tensorstore.open(spec, open=True, create=True, context=context).result()


def _check_room(draft: Path, cfg: ModelConfig, dtypes: dict[str, np.dtype]) -> None:
    needed = sum(spec.size * dtypes[path].itemsize for path, spec in tensor_specs(cfg).items())
    there = sum(f.stat().st_size for f in draft.rglob("*") if f.is_file())
    free = shutil.disk_usage(draft).free
    if free < needed - there:
        raise CheckpointError(
            f"{draft.parent} has {free >> 20} MiB free; the weights of {cfg.name} need {(needed - there) >> 20} MiB. "
            "Make room, or convert to another place: moejax convert SRC DST."
        )


@contextlib.contextmanager
def _alone(draft: Path) -> Iterator[None]:
    """Wait until no other process converts to the same target."""
    with (draft.parent / f"{draft.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@dataclasses.dataclass
class _Journal:
    """Which chunks of a draft are written, with their checksums; empty when the draft is of another conversion."""

    draft: Path
    of: str
    checksums: dict[str, int] = dataclasses.field(default_factory=dict)
    _file: IO[str] | None = None

    def __enter__(self) -> "_Journal":
        path = self.draft / JOURNAL
        lines = path.read_text().split("\n") if path.is_file() else []
        if lines[:1] == [self.of]:
            for line in lines[1:-1]:  # the last may have been cut short
                key, crc = json.loads(line)
                self.checksums[key] = crc
            kept = "".join(f"{line}\n" for line in lines[:-1])
        else:
            shutil.rmtree(self.draft)
            self.draft.mkdir()
            kept = f"{self.of}\n"
        path.write_text(kept)
        self._file = path.open("a")
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._file is not None:
            self._file.close()

    def note(self, key: str, crc: int) -> None:
        """Remember that a chunk is on disk."""
        assert self._file is not None, "entered"
        self.checksums[key] = crc
        self._file.write(json.dumps([key, crc]) + "\n")
        self._file.flush()


@contextlib.contextmanager
def progress(text: str) -> Iterator[Say]:
    """A bar on the error stream."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def main(arguments: list[str] | None = None) -> int:
    """Convert what the command line says; the exit status is 1 with one line of cause when it cannot be done."""
    parser = argparse.ArgumentParser(prog="moejax convert", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", metavar="SRC", type=Path, help="folder of config.json and safetensors")
    parser.add_argument("target", metavar="DST", type=Path, help="model folder to write; an older one is replaced")
    parser.add_argument("--dtype", choices=DTYPES, help="how weights are stored (default: as published)")
    parser.add_argument("--name", help="the model's name (default: that of SRC)")
    given = parser.parse_args(arguments)
    try:
        with progress(f"Converting {given.source}") as say:
            cfg = convert(given.source, given.target, name=given.name, dtype=given.dtype, say=say)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"moejax: {error}", file=sys.stderr)
        return 1
    print(f"{cfg.name} ({cfg.family}) is in {given.target}: moejax serve --model {given.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
