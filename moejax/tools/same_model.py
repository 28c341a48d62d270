"""Whether two folders hold the same model and differ in their weights alone: configuration, vocabulary, data types.

The other files of the tokenizer, the chat template and the defaults of sampling may differ: the served ones stay, and
`unused_files` says which of the others are not used.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from moejax.checkpoint.families import read_config
from moejax.checkpoint.manifest import CheckpointError, Manifest
from moejax.checkpoint.model_folder import TOKENIZERS
from moejax.checkpoint.shard_dense import sharded_dense_config
from moejax.config.config_values import ConfigError
from moejax.config.model_config import ModelConfig
from moejax.tools.resolve import is_published

NOT_COMPARED = frozenset({"name", "weights", "mtp"})
"""Fields of the configuration that may differ: new weights are held in the format of the old ones, and with a layer of
multi-token prediction if those have it."""
SERVED_FILES = (
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)
"""Files that say how a model is talked to: the server goes on with its own."""


def check_same_model(other: Path, served: Path, *, sharded: bool) -> None:
    """Raise ConfigError or CheckpointError, naming the first difference with both values, unless the folder `other`
    holds the model of `served`, our form of it, with other weights. `sharded`: the dense layers of `served` are
    shards. Reads no weights."""
    if not other.is_dir():
        raise CheckpointError(f"{other} is no folder on this machine.")
    published = is_published(other)
    cfg = read_config(other) if published else ModelConfig.load(other)
    if sharded:
        cfg = sharded_dense_config(cfg) or cfg
    check_same_config(cfg, ModelConfig.load(served))
    _check_same_vocabulary(other, served)


def check_same_config(cfg: ModelConfig, served: ModelConfig) -> None:
    """Raise ConfigError, naming the first field that differs with both values, unless these are equal but for those
    in NOT_COMPARED."""
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(served, field.name), getattr(cfg, field.name)
        if field.name not in NOT_COMPARED and ours != theirs:
            raise ConfigError(
                f"{field.name} is {theirs}, and that of the served model is {ours}. New weights need the same "
                "configuration; serve another model with another server."
            )


def check_same_dtypes(folder: Path, served: Path) -> None:
    """Raise CheckpointError, naming the first tensor that differs with both types, unless two prepared folders store
    each tensor in the same number format."""
    theirs, ours = (Manifest.load(each).tensors for each in (folder, served))
    for name, tensor in ours.items():
        if (other := theirs[name].dtype) != tensor.dtype:
            raise CheckpointError(
                f"tensor {name} is stored as {other}, and that of the served model as {tensor.dtype}. Write the new "
                "weights in the number format of the old ones."
            )


def unused_files(other: Path, served: Path) -> tuple[str, ...]:
    """The files of new weights that say how the model is talked to, and say it otherwise than those of the served
    model; also one that only either of them has."""
    names = sorted(
        {str(file.relative_to(each)) for each in (other, served) for name in SERVED_FILES for file in each.glob(name)}
    )
    return tuple(name for name in names if _content(other / name) != _content(served / name))


def _content(file: Path) -> Any:
    """The part of a file that is compared: the value of JSON, else the text without a byte-order mark and the white
    space around it; None where there is no file."""
    if not file.is_file():
        return None
    text = file.read_text("utf-8-sig", errors="replace").strip()
    try:
        return json.loads(text) if file.suffix == ".json" else text
    except ValueError:
        return text


def _check_same_vocabulary(other: Path, served: Path) -> None:
    ours, theirs = _vocabulary(served), _vocabulary(other)
    if ours != theirs:
        raise CheckpointError(
            f"the vocabulary of {other} is not that of the served model: {theirs[0]} and {ours[0]} differ. "
            "New weights need the same tokenizer."
        )


def _vocabulary(folder: Path) -> tuple[str, Any]:
    """The name of the file that the vocabulary is in, and what is compared of it."""
    found = next((file for pattern in TOKENIZERS for file in sorted(folder.glob(pattern))), None)
    if found is None:
        raise CheckpointError(f"{folder} lacks {' or '.join(TOKENIZERS)}: the vocabulary cannot be compared.")
    if found.suffix != ".json" or found.name == "tekken.json":
        return found.name, found.read_bytes()
    value = json.loads(found.read_text("utf-8-sig"))
    added = [(token["id"], token["content"]) for token in value.get("added_tokens") or ()]
    model = value.get("model") or {}
    return found.name, (model.get("vocab"), model.get("merges"), sorted(added))
