"""A folder as models are published, as a source: its name, whether it is whole, and its arrays one by one.

Everything is checked against the configuration before any weight is read.
"""

import hashlib
import itertools
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from moejax.checkpoint import TOKENIZERS
from moejax.config import ModelConfig
from moejax.families import is_unused, read_config, tensor_names
from moejax.families.source import Entry
from moejax.manifest import CheckpointError, Manifest, Tensor, tensor_specs
from moejax.safetensors_folder import SafetensorsFolder

FORM = 1
"""Of what is written; a change makes drafts and cached conversions anew."""
DTYPES = ("float32", "bfloat16", "float16")
TOKENIZER_FILES = (*TOKENIZERS, "tokenizer_config.json", "chat_template.jinja")


def published_name(source: Path) -> str:
    """The name of a published folder; in the cache of the Hugging Face hub, that of its repository."""
    source = source.resolve()
    hub = source.parent.parent.name
    return hub.split("--")[-1] if source.parent.name == "snapshots" and hub.startswith("models--") else source.name


def fingerprint(source: Path, cfg: ModelConfig, dtype: str | None) -> str:
    """16 hexadecimal digits that change when a weight file, the configuration or the form written does."""
    digest = hashlib.sha256(f"{FORM} {dtype} {cfg.to_json()}".encode())
    for file in sorted(source.glob("*.safetensors*")) + [f for p in TOKENIZER_FILES for f in sorted(source.glob(p))]:
        found = file.stat()
        digest.update(f"{file.name} {found.st_size} {found.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def check(cfg: ModelConfig, weights: SafetensorsFolder) -> None:
    """Raise CheckpointError unless the folder holds exactly the tensors of `cfg`, in their shapes."""
    used = set()
    for entry in tensor_names(cfg):
        for tensor in entry.tensors:
            if tensor.name not in used:
                weights.check(tensor.name, tensor.shape, _label(entry))
                used.add(tensor.name)
    for name in sorted(weights.names() - used):
        if not is_unused(cfg, name):
            raise CheckpointError(
                f"{weights.file(name)}: tensor {name} of shape {weights.shape(name)} has no place in the model that "
                f"config.json describes ({cfg.family}, {cfg.n_layers} layers). The two belong to different models."
            )


def open_published(source: Path, name: str | None = None) -> tuple[ModelConfig, SafetensorsFolder]:
    """The model of a published folder and its weights, once everything about them is checked.

    Raises ConfigError or CheckpointError for an architecture that is not served, for tensors that are missing, cut
    short or of another shape, and without a tokenizer.
    """
    cfg = read_config(source, name=name or published_name(source))
    weights = SafetensorsFolder.open(source)
    check(cfg, weights)
    if not any(file for pattern in TOKENIZERS for file in source.glob(pattern)):
        raise CheckpointError(f"{source} has no tokenizer: none of {', '.join(TOKENIZERS)} is there.")
    return cfg, weights


def stored_dtypes(cfg: ModelConfig, weights: SafetensorsFolder, dtype: str | None) -> dict[str, np.dtype]:
    """The stored format of each leaf: the one that holds all the tensors it is made of."""
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype is {dtype!r}; known are {', '.join(DTYPES)}.")
    found: dict[str, np.dtype] = {}
    for entry in tensor_names(cfg):
        for each in [weights.dtype(tensor.name) for tensor in entry.tensors] or [np.dtype(np.float32)]:
            found[entry.path] = np.promote_types(found.get(entry.path, each), each)
    return found if dtype is None else dict.fromkeys(found, jnp.dtype(dtype))


def read_array(entry: Entry, weights: SafetensorsFolder, dtype: np.dtype) -> np.ndarray:
    """One array of ours: only the bytes of the tensors, or parts of tensors, that it is made of."""
    array = entry.array([weights.read(tensor.name, tensor.index) for tensor in entry.tensors], dtype)
    assert array.shape == entry.shape, (entry, array.shape)
    return array


def manifest_of(cfg: ModelConfig, dtypes: dict[str, np.dtype], checksums: dict[str, int]) -> Manifest:
    """What is stored, from the checksum of every array by its `array_key`."""
    tensors = {}
    for path, entries in itertools.groupby(tensor_names(cfg), key=lambda entry: entry.path):
        crc32 = tuple(checksums[array_key(entry)] for entry in entries)
        tensors[path] = Tensor(tensor_specs(cfg)[path].shape, dtypes[path].name, crc32)
    return Manifest(tensors)


def copy_tokenizer(source: Path, draft: Path) -> None:
    """Copy what the tokenizer and its templates are in."""
    for file in (f for pattern in TOKENIZER_FILES for f in source.glob(pattern)):
        shutil.copyfile(file, draft / file.name)


def array_key(entry: Entry) -> str:
    """What no other array of a model has."""
    return f"{entry.path} {entry.repeat} {entry.expert}"


def _label(entry: Entry) -> str:
    where = "" if entry.layer is None else f" of layer {entry.layer}"
    which = "" if entry.expert is None else f", expert {entry.expert}"
    return f"{entry.path.split('.', 3)[-1]}{where}{which}"
