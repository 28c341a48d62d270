"""Converts a published model folder (safetensors) to a model folder of moejax, one array at a time, resumably.

    python -m moejax.checkpoint.convert SRC DST [--dtype float32]

The draft lies beside the target as `.NAME.converting`. Every chunk that is written is recorded in its
journal, so the next run resumes one that was killed; a draft of other files is deleted. Only a complete folder gets the
target's name.
"""

import argparse
import collections
import contextlib
import dataclasses
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

from moejax.checkpoint.checkpoint import write_metadata
from moejax.checkpoint.families import array_sources
from moejax.checkpoint.families.source import ArraySource
from moejax.checkpoint.manifest import FILE, CheckpointError, checksum
from moejax.checkpoint.model_folder import PARAMS, exclusive, replace_folder
from moejax.checkpoint.published import (
    DTYPES,
    array_key,
    copy_tokenizer,
    fingerprint,
    manifest_of,
    open_published,
    read_array,
    stored_dtypes,
)
from moejax.checkpoint.safetensors import SafetensorsFolder
from moejax.config.model_config import ModelConfig
from moejax.config.params import tensor_specs

JOURNAL = "journal.jsonl"
IN_FLIGHT = 256 << 20
"""Bytes being written while the next array is read; one array may be more."""

ProgressCallback = Callable[[int, int], None]
"""Called with the bytes done and the total bytes."""


def convert(
    source: Path,
    target: Path,
    *,
    name: str | None = None,
    dtype: str | None = None,
    on_progress: ProgressCallback,
    mtp: bool = False,
) -> ModelConfig:
    """Write the model folder `target` from the published folder `source`, replacing what was there; with `mtp` also its
    layer of multi-token prediction.

    `dtype` is what weights are stored as; None keeps the published one (bfloat16 for float8 and MXFP4). Memory is
    that of the largest tensor, not of the model. Raises ConfigError or CheckpointError, before anything is written,
    for an architecture that is not served and for tensors that are missing, cut short, or of another shape.
    """
    source, target = Path(source), Path(target)
    cfg, weights = open_published(source, name, mtp=mtp)
    dtypes = stored_dtypes(cfg, weights, dtype)
    draft = target.parent / f".{target.name}.converting"
    of = fingerprint(source, cfg, dtype)
    with exclusive(draft):
        draft.mkdir(exist_ok=True)
        _check_disk_space(draft, cfg, dtypes)
        with _Journal(draft, of) as journal:
            _write_arrays(draft / PARAMS, cfg, weights, dtypes, journal, on_progress)
            manifest = manifest_of(cfg, dtypes, journal.checksums)
        manifest.check_config(cfg, draft)
        write_metadata(draft / PARAMS, cfg)
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
    on_progress: ProgressCallback,
) -> None:
    specs = tensor_specs(cfg)
    total = sum(spec.size * dtypes[path].itemsize for path, spec in specs.items())
    done = 0
    context = tensorstore.Context({"file_io_concurrency": {"limit": 4}})
    pending: collections.deque[tuple[Any, str, int, int]] = collections.deque()

    def finish_first() -> None:
        write, key, crc, _ = pending.popleft()
        write.result()
        journal.add(key, crc)

    for path, entries in itertools.groupby(array_sources(cfg), key=lambda entry: entry.path):
        leaf = None
        for entry in entries:
            size = int(np.prod(entry.shape, dtype=np.int64)) * dtypes[path].itemsize
            if array_key(entry) not in journal.checksums or not _is_written(
                params, entry, len(specs[path].shape), size
            ):
                if leaf is None:
                    shape = specs[path].shape
                    leaf = open_leaf(params, path, shape, len(shape) - len(entry.shape), dtypes[path], context)
                array = np.ascontiguousarray(read_array(entry, weights, dtypes[path]))
                index = tuple(i for i in (entry.repeat, entry.expert) if i is not None)
                while pending and (pending[0][0].done() or sum(f[3] for f in pending) + size > IN_FLIGHT):
                    finish_first()
                pending.append((leaf[index].write(array), array_key(entry), checksum(array), size))
            done += size
            on_progress(done, total)
    while pending:
        finish_first()


def _is_written(params: Path, entry: ArraySource, axes: int, size: int) -> bool:
    """Whether the chunk of an array is on disk: after a power cut the journal may list chunks that are not."""
    index = [i for i in (entry.repeat, entry.expert) if i is not None]
    file = params.joinpath("state", entry.path, "c", *map(str, index + [0] * (axes - len(index))))
    return file.is_file() and file.stat().st_size == size


def open_leaf(
    params: Path, name: str, shape: tuple[int, ...], chunked: int, dtype: np.dtype, context: tensorstore.Context
) -> tensorstore.TensorStore:
    """The array of tensor `name` on disk, created if missing, as Orbax lays it out: one chunk for each index of
    the first `chunked` axes, which are repeat and expert."""
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


def _check_disk_space(draft: Path, cfg: ModelConfig, dtypes: dict[str, np.dtype]) -> None:
    needed = sum(spec.size * dtypes[path].itemsize for path, spec in tensor_specs(cfg).items())
    there = sum(f.stat().st_size for f in draft.rglob("*") if f.is_file())
    free = shutil.disk_usage(draft).free
    if free < needed - there:
        raise CheckpointError(
            f"{draft.parent} has {free >> 20} MiB free; the weights of {cfg.name} need {(needed - there) >> 20} MiB. "
            "Make room, or convert to another place: moejax convert SRC DST."
        )


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
            valid = "".join(f"{line}\n" for line in lines[:-1])
        else:
            shutil.rmtree(self.draft)
            self.draft.mkdir()
            valid = f"{self.of}\n"
        path.write_text(valid)
        self._file = path.open("a")
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, key: str, crc: int) -> None:
        """Record that a chunk is on disk."""
        assert self._file is not None, "entered"
        self.checksums[key] = crc
        self._file.write(json.dumps([key, crc]) + "\n")
        self._file.flush()


@contextlib.contextmanager
def progress(text: str) -> Iterator[ProgressCallback]:
    """A progress bar on standard error; yields the callback that advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def main(arguments: list[str] | None = None) -> int:
    """`moejax convert`: exit status 1 and one line with the cause when the conversion fails."""
    parser = argparse.ArgumentParser(prog="moejax convert", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "source", metavar="SRC", type=Path, help="folder of config.json or params.json, and safetensors"
    )
    parser.add_argument("target", metavar="DST", type=Path, help="model folder to write; an older one is replaced")
    parser.add_argument("--dtype", choices=DTYPES, help="how weights are stored (default: as published)")
    parser.add_argument("--name", help="the model's name (default: that of SRC)")
    given = parser.parse_args(arguments)
    try:
        with progress(f"Converting {given.source}") as on_progress:
            cfg = convert(given.source, given.target, name=given.name, dtype=given.dtype, on_progress=on_progress)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"moejax: {error}", file=sys.stderr)
        return 1
    print(f"{cfg.name} ({cfg.family}) is in {given.target}: moejax serve --model {given.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
