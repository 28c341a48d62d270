"""A published config.json becomes a ModelConfig, or an error that names the field."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moejax.config import ConfigError, ModelConfig
from moejax.families.decoder import read_stop_tokens
from moejax.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, KIMI_K2
from moejax.families.family import Family
from moejax.families.fields import Fields
from moejax.families.glm4_moe import GLM4_MOE
from moejax.families.gpt_oss import GPT_OSS
from moejax.families.granite_moe import GRANITE_MOE
from moejax.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from moejax.families.mixtral import MIXTRAL
from moejax.families.olmoe import OLMOE
from moejax.families.phimoe import PHIMOE
from moejax.families.qwen_moe import QWEN2_MOE, QWEN3_MOE

_ALL = (
    *(MIXTRAL, LLAMA, MISTRAL, QWEN2, QWEN3, QWEN2_MOE, QWEN3_MOE, OLMOE),
    *(DEEPSEEK_V2, DEEPSEEK_V3, KIMI_K2, GPT_OSS, GLM4_MOE, GRANITE_MOE, PHIMOE),
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}
"""Families by `model_type`."""


def read_config(
    source: str | Path | Mapping[str, Any], *, name: str | None = None, max_context: int | None = None
) -> ModelConfig:
    """The model that a config.json describes: `source` is its folder, its path, or its values.

    `name` is the folder's unless given. `max_context` serves a shorter context than the published one. From a folder,
    the stop tokens of generation_config.json and the begin token of the tokenizer's files are read too.
    Raises ConfigError for an architecture that is not served, a missing field, or fields that contradict.
    """
    folder = None
    if isinstance(source, Mapping):
        f = Fields(source, "config.json", max_context)
    else:
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        folder = path.parent
        f = Fields(_json(path), str(path), max_context)
    family = _family(f)
    values = family.read(f)
    if folder is not None:
        values["stop_tokens"] = _stop_tokens(folder, values["stop_tokens"])
        values["bos_token"] = _bos_token(folder, f)
    name = name or (folder.name if folder is not None else family.model_type)
    try:
        return ModelConfig(name=name, family=family.model_type, **values)
    except ConfigError as error:
        raise ConfigError(f"{f.where}: {error}") from error


def _family(f: Fields) -> Family:
    kind = f.values.get("model_type")
    named = f.listed("architectures", str, ())
    family = FAMILIES.get(kind)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise f.error(f"model_type is {kind!r} (architectures {list(named)}), which is not served; served are {known}")
    for architecture in named:
        if architecture not in family.architectures:
            raise f.error(
                f"architectures names {architecture}, but model_type {kind!r} is {' or '.join(family.architectures)}"
            )
    return family


def _stop_tokens(folder: Path, stop: tuple[int, ...]) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    if not path.is_file():
        return stop
    return tuple(dict.fromkeys((*stop, *read_stop_tokens(Fields(_json(path), str(path))))))


def _bos_token(folder: Path, f: Fields) -> int | None:
    """`bos_token_id` if the tokenizer puts it in front of every text; most do not."""
    path = folder / "tokenizer_config.json"
    if not f.has("bos_token_id") or not path.is_file():
        return None
    return f.integer("bos_token_id", least=0) if _json(path).get("add_bos_token") else None


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; a JSON object is needed.")
    return values
