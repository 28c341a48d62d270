"""A published model folder as a source: its name, checks that it is complete, and its arrays one by one.

Everything is checked against the configuration before any weight is read.
"""

import dataclasses
import hashlib
import itertools
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from moejax.checkpoint.families import WITHOUT_MTP, array_sources, is_unused, read_config
from moejax.checkpoint.families.source import ArraySource, PlusOne
from moejax.checkpoint.manifest import CheckpointError, Manifest, TensorRecord
from moejax.checkpoint.model_folder import TOKENIZERS
from moejax.checkpoint.safetensors import SafetensorsFolder
from moejax.config.model_config import ModelConfig
from moejax.config.params import is_expert, tensor_specs

FORMAT_VERSION = 1
"""Version of the converted form; changing it invalidates drafts and cached conversions."""
DTYPES = ("float32", "bfloat16", "float16")
TOKENIZER_FILES = (
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
"""Patterns of the files that say how text becomes tokens and how an answer is sampled."""


def published_name(source: Path) -> str:
    """The name of a published folder; in the cache of the Hugging Face hub, that of its repository."""
    source = source.resolve()
    hub = source.parent.parent.name
    return hub.split("--")[-1] if source.parent.name == "snapshots" and hub.startswith("models--") else source.name


def fingerprint(source: Path, cfg: ModelConfig, dtype: str | None) -> str:
    """16 hexadecimal digits that change when a weight file, the configuration or the form written does."""
    digest = hashlib.sha256(f"{FORMAT_VERSION} {dtype} {cfg.to_json()}".encode())
    for file in sorted(source.glob("*.safetensors*")) + [f for p in TOKENIZER_FILES for f in sorted(source.glob(p))]:
        found = file.stat()
        digest.update(f"{file.name} {found.st_size} {found.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def check_tensors(cfg: ModelConfig, weights: SafetensorsFolder) -> None:
    """Raise CheckpointError unless the folder holds exactly the tensors of `cfg`, in their shapes."""
    used = set()
    for entry in array_sources(cfg):
        for tensor in entry.tensors:
            if tensor.name not in used:
                weights.check_tensor(tensor.name, tensor.shape, _label(entry))
                used.add(tensor.name)
    for name in sorted(weights.names() - used):
        if not is_unused(cfg, name) and not weights.is_void_bias(name):
            raise CheckpointError(
                f"{weights.file(name)}: tensor {name} of shape {weights.shape(name)} has no place in the model that "
                f"config.json describes ({cfg.family}, {cfg.n_layers} layers). The two belong to different models."
            )


def open_published(
    source: Path, name: str | None = None, *, mtp: bool = False
) -> tuple[ModelConfig, SafetensorsFolder]:
    """The model of a published folder, with its layer of multi-token prediction if `mtp`, and its weights, once
    everything about them is checked.

    Raises ConfigError or CheckpointError for an architecture that is not served, for tensors that are missing, cut
    short or of another shape, and without a tokenizer.
    """
    cfg = read_config(source, name=name or published_name(source), mtp=mtp)
    weights = SafetensorsFolder.open(source)
    if mtp:
        _check_mtp(cfg, weights, source)
    check_tensors(cfg, weights)
    if weights.unused:
        print(
            f"{source.name}: {len(weights.unused)} scales of activations or of the KV cache ({min(weights.unused)}, "
            "...) are not used: ranks compute in float32, and --kv-cache-type makes scales of its own.",
            file=sys.stderr,
        )
    if not any(file for pattern in TOKENIZERS for file in source.glob(pattern)):
        raise CheckpointError(f"{source} has no tokenizer: none of {', '.join(TOKENIZERS)} is there.")
    return cfg, weights


def _check_mtp(cfg: ModelConfig, weights: SafetensorsFolder, source: Path) -> None:
    """Raise CheckpointError where the layer that config.json names was left out, as some quantised copies do."""
    needed = (tensor.name for entry in array_sources(cfg) if entry.path.startswith("mtp.") for tensor in entry.tensors)
    for name in needed:
        if name not in weights.names():
            raise CheckpointError(
                f"{source} has no tensor {name}: its config.json names a layer of multi-token prediction, whose "
                f"weights are not there. {WITHOUT_MTP}"
            )


def stored_dtypes(cfg: ModelConfig, weights: SafetensorsFolder, dtype: str | None) -> dict[str, np.dtype]:
    """The stored format of each leaf: the one that holds all the tensors it is made of; float32 for what is computed of
    them."""
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype is {dtype!r}; known are {', '.join(DTYPES)}.")
    found: dict[str, np.dtype] = {}
    for entry in array_sources(cfg):
        for each in [weights.dtype(tensor.name) for tensor in entry.tensors] or [np.dtype(np.float32)]:
            computed = np.dtype(np.float32) if isinstance(entry.transform, PlusOne) else each
            found[entry.path] = np.promote_types(found.get(entry.path, computed), computed)
    return found if dtype is None else dict.fromkeys(found, jnp.dtype(dtype))


def read_array(entry: ArraySource, weights: SafetensorsFolder, dtype: np.dtype, *, exactly: bool = False) -> np.ndarray:
    """One array of the parameter tree; reads only the bytes that it is made of (`SafetensorsFolder.read_exactly`)."""
    read = weights.read_exactly if exactly else weights.read
    array = entry.array([read(tensor.name, tensor.index) for tensor in entry.tensors], dtype)
    assert array.shape == entry.shape, (entry, array.shape)
    return array


def has_int4_experts(cfg: ModelConfig, weights: SafetensorsFolder) -> bool:
    """True where the matrices of all experts are published in a form of int4 that ranks can hold as it is."""
    matrices = [entry for entry in array_sources(cfg) if is_expert(entry.path) and len(entry.shape) == 2]
    return bool(matrices) and all(weights.is_int4(tensor.name) for entry in matrices for tensor in entry.tensors)


def check_mtp_int4(source: Path) -> None:
    """Raise CheckpointError where the experts of the layers are published in int4 and those of the layer of multi-token
    prediction are not: held as they are, all are of one form."""
    cfg, weights = read_config(source, name=published_name(source), mtp=True), SafetensorsFolder.open(source)
    _check_mtp(cfg, weights, source)
    if has_int4_experts(dataclasses.replace(cfg, mtp=False), weights) and not has_int4_experts(cfg, weights):
        raise CheckpointError(
            f"{cfg.name} has its experts in int4, and those of its layer of multi-token prediction in another form: "
            f"with that layer none can be held as published. {WITHOUT_MTP}"
        )


def manifest_of(cfg: ModelConfig, dtypes: dict[str, np.dtype], checksums: dict[str, int]) -> Manifest:
    """The manifest of the stored arrays; `checksums` has that of every array by its `array_key`."""
    tensors = {}
    for path, entries in itertools.groupby(array_sources(cfg), key=lambda entry: entry.path):
        crc32 = tuple(checksums[array_key(entry)] for entry in entries)
        tensors[path] = TensorRecord(tensor_specs(cfg)[path].shape, dtypes[path].name, crc32)
    return Manifest(tensors)


def copy_tokenizer(source: Path, draft: Path) -> None:
    """Copy the files of the tokenizer, its templates, and the defaults of sampling."""
    for file in (f for pattern in TOKENIZER_FILES for f in source.glob(pattern)):
        place = draft / file.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, place)


def array_key(entry: ArraySource) -> str:
    """A key that identifies an array within its model."""
    return f"{entry.path} {entry.repeat} {entry.expert}"


def _label(entry: ArraySource) -> str:
    where = "" if entry.layer is None else f" of layer {entry.layer}"
    which = "" if entry.expert is None else f", expert {entry.expert}"
    return f"{entry.path.split('.', 3)[-1]}{where}{which}"
