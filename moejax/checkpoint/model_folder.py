"""The names in a model folder, and how a folder is made: completely or not at all, by one process at a time.

Apart from `moejax.checkpoint.checkpoint`, which imports Orbax: a rank reads the host's copy of the weights, and starts
without it.
"""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from moejax.checkpoint.manifest import CheckpointError, content_hash

RECIPE = 3
"""Part of the folder name of models that are made here. Raise it when a recipe changes, so that they are made again."""
PARAMS = "params"
CHANGED = "changed-tensors.json"
"""File of a folder that was made of another one and some changed tensors (`moejax.tools.changed_tensors`): the name of
the model."""
MADE = "made"
"""Its folder of all that is made of it, such as its conversion, which goes with it."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model*", "tekken.json")
"""Patterns of the files that a tokenizer is in; `serving.text.tokenizer_formats` reads the first that is there."""


def changed_name(folder: Path) -> str:
    """The model's name in a folder of changed tensors; empty in any other."""
    try:
        return json.loads((folder / CHANGED).read_text())["name"]
    except FileNotFoundError:
        return ""


@contextlib.contextmanager
def draft_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`: renamed to it on success, removed on failure."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield draft
        draft.chmod(0o755)
        replace_folder(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that is to be made: another process that makes it too waits, and then finds it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name.lstrip('.')}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def replace_folder(draft: Path, folder: Path) -> None:
    """Rename `draft` to `folder`, replacing what was there."""
    try:
        os.rename(draft, folder)
    except OSError:
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
        os.rename(folder, old / "folder")
        os.rename(draft, folder)
        shutil.rmtree(old, ignore_errors=True)


def checked_folder(folder: Path) -> Path:
    """The folder, if all that a model folder holds is there; else CheckpointError naming what is missing."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is no folder, and no model has that name; known are smollm2-moe, tiny and bench-mixtral."
        )
    for patterns in (("config.json",), TOKENIZERS, (PARAMS,)):
        if not any(file for pattern in patterns for file in folder.glob(pattern)):
            raise CheckpointError(f"{folder} lacks {' or '.join(patterns)}: it is no model folder.")
    content_hash(folder)
    return folder
