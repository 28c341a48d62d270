"""A published model folder as a source: its name, checks that it is complete, and its arrays one by one.

Everything is checked against the configuration before any weight is read.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import math
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from moejax.checkpoint.families import WITHOUT_MTP, array_sources, is_unused, read_config
from moejax.checkpoint.families.source import ArraySource, OfRows, PlusOne
from moejax.checkpoint.manifest import CheckpointError, Manifest, TensorRecord
from moejax.checkpoint.model_folder import TOKENIZERS, changed_name
from moejax.checkpoint.safetensors import SafetensorsFolder
from moejax.config.eight_bit import spread_over_columns
from moejax.config.int4 import Planes
from moejax.config.model_config import ModelConfig
from moejax.config.packed_form import PackedForm, part_of
from moejax.config.params import tensor_specs
from moejax.config.weight_formats import Quantized, from_published, is_matrix

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
    """The name of a published folder; in the cache of the Hugging Face hub, that of its repository. A folder of changed
    tensors has that of the folder it was made of."""
    source = source.resolve()
    if name := changed_name(source):
        return name
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
                f"{weights.config} describes ({cfg.family}, {cfg.n_layers} layers). The two belong to different models."
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


def read_array(entry: ArraySource, weights: SafetensorsFolder, dtype: np.dtype) -> np.ndarray:
    """One array of the parameter tree; reads only the bytes that it is made of."""
    array = entry.array([weights.read(tensor.name, tensor.index) for tensor in entry.tensors], dtype)
    assert array.shape == entry.shape, (entry, array.shape)
    return array


def read_packed(entry: ArraySource, weights: SafetensorsFolder, form: PackedForm) -> Quantized | None:
    """One matrix of the parameter tree in the bits in which it is published; None where it is not in this form after
    all (`moejax.config.weight_formats.from_published`)."""
    found = [weights.read_planes(tensor.name, tensor.index) for tensor in entry.tensors]
    if not isinstance(entry.transform, OfRows):
        found = [spread_over_columns(each) for each in found]
    zeros = [each.zero for each in found if each.zero is not None]
    factors = [each.factor for each in found if each.factor is not None]
    moved = Planes(
        codes=entry.transform([each.codes for each in found]),
        scale=entry.transform([each.scale for each in found]),
        zero=entry.transform(zeros) if zeros else None,
        factor=entry.transform(factors) if factors else None,
    )
    return from_published(moved, form)


def packed_form(cfg: ModelConfig, weights: SafetensorsFolder) -> PackedForm | None:
    """The form of four or eight bits that ranks can hold matrices in as they are published, as far as the headers show:
    that of the experts, or of most matrices. None where there is none.

    Of each part all layers have it. The two matrices of experts have it both or not at all.
    """
    specs, forms = tensor_specs(cfg), collections.defaultdict[str, set[PackedForm | None]](set)
    sizes: dict[str, int] = collections.defaultdict(int)
    rows: dict[str, int] = {}
    for entry in array_sources(cfg):
        spec = specs[entry.path]
        if is_matrix(spec) and "vocab" not in spec.axes:
            part = part_of(spec.axes)
            found = {_form_of(entry, tensor.name, weights) for tensor in entry.tensors} or {None}
            forms[part] |= found
            sizes[part] += math.prod(entry.shape)
            for form in found:
                if form is not None and form.rows > 1:
                    rows[part] = min(rows.get(part, form.rows), _rows_alike(entry, form.rows))
    alike = {part: next(iter(found)) for part, found in forms.items() if len(found) == 1}
    experts = [part for part in forms if "expert" in part.split()]
    if len({alike.get(part) for part in experts}) > 1:
        alike = {part: form for part, form in alike.items() if part not in experts}
    known = {part: form for part, form in alike.items() if form is not None}
    if not known:
        return None
    most = max(known, key=lambda part: (part in experts, sizes[part]))
    parts = tuple(sorted(part for part in known if known[part] == known[most]))
    return dataclasses.replace(known[most], parts=parts, rows=min(rows.get(part, 1) for part in parts))


def _form_of(entry: ArraySource, name: str, weights: SafetensorsFolder) -> PackedForm | None:
    """The form of a tensor as the matrix of the parameter tree has it: transforms that do not move whole rows turn
    it."""
    form = weights.packed(name)
    return form if form is None or isinstance(entry.transform, OfRows) else form.turned


@functools.lru_cache(maxsize=1024)
def _alike(transform: OfRows, tensor_rows: tuple[int, ...], rows: int) -> int:
    blocks = [i * max(tensor_rows) + np.arange(count)[:, None] // rows for i, count in enumerate(tensor_rows)]
    moved = transform(blocks)
    while not np.array_equal(np.repeat(moved[..., ::rows, :], rows, axis=-2)[..., : moved.shape[-2], :], moved):
        rows //= 2
    return rows


def _rows_alike(entry: ArraySource, rows: int) -> int:
    """How many outputs share their scales in a matrix of the parameter tree, made of tensors of which `rows` outputs at
    a time do: fewer where the pieces that the matrix is put together of end within them."""
    if not isinstance(entry.transform, OfRows):
        return rows
    return _alike(entry.transform, tuple(tensor.shape[-2] for tensor in entry.tensors), rows)


def check_mtp_packed(source: Path) -> None:
    """Raise CheckpointError where the experts of the layers can be held as they are published and those of the layer of
    multi-token prediction are of another form: held as they are, all are of one form."""
    cfg, weights = read_config(source, name=published_name(source), mtp=True), SafetensorsFolder.open(source)
    _check_mtp(cfg, weights, source)
    forms = [packed_form(each, weights) for each in (dataclasses.replace(cfg, mtp=False), cfg)]
    before, after = (form is not None and form != form.without("expert") for form in forms)
    if before and not after:
        raise CheckpointError(
            f"{cfg.name} has its experts as {forms[0]}, and those of its layer of multi-token prediction in another "
            f"form: with that layer none can be held as published. {WITHOUT_MTP} Or take another --data-type, such as "
            "bfloat16."
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
