"""Reads a published config.json, or the params.json of Mistral's own format: the one reader of planner and server,
without JAX.

Architectures stand in `planner.inputs.published.families`. Values are the same as in `transformers`: a field that is
absent has the default of its class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.errors import InputError, unknown_key, unknown_value
from planner.inputs.file_kinds import described
from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.families import FAMILIES, NOT_READ
from planner.inputs.published.mistral_format import FILE, config_file, params_values
from planner.inputs.published.model import PublishedModel
from planner.inputs.published.weight_form import read_weight_form, uniform_form
from planner.inputs.shipped import shipped

MODELS = shipped("configs/models")
"""The configurations that come with moejax, by name."""

QUANTIZATION_FILE = "hf_quant_config.json"


def published_model(
    values: Mapping[str, Any], where: str = "config.json", *, weights: str | None = None
) -> PublishedModel:
    """The model that the `values` of a config.json describe; `where` names the file in errors.

    `weights` is a format of `BYTES` for the weights, instead of the published one. Raises InputError for an
    architecture that is not known, a field that is missing or wrong, and fields that contradict each other.
    """
    kind, fields = decoder_fields(values, where)
    if lacking := NOT_READ.get(kind.removesuffix("_text")) or NOT_READ.get(str(values.get("model_type"))):
        named = values.get("model_type", kind)
        raise InputError(f"{where}: models of model_type {named!r} are not supported yet; the decoder lacks {lacking}.")
    if not any("model_type" in each for each in (values, _decoder_values(values))):
        raise InputError(
            f"{where} has neither model_type, as a config.json has, nor moe_layers, as a JSON of the fields of "
            f"planner.Workload has; it is {described(dict(values))}."
        )
    if kind not in FAMILIES:
        raise unknown_key(kind, FAMILIES, f"{where} (model_type)")
    found = FAMILIES[kind].read(fields)
    for key in ("dense_layers", "unrotated_layers"):
        if beyond := [i for i in found.get(key, ()) if not 0 <= i < found["layers"]]:
            raise fields.error(f"layer {beyond[0]} is named in a model of {found['layers']} layers (0 is the first)")
    model = PublishedModel(family=kind, form=uniform_form(weights or "bfloat16"), **found)
    if weights is not None:
        return model
    form = read_weight_form(fields, layers=model.layers, routed=model.routed_layers)
    return PublishedModel(family=kind, form=form, **found)


def decoder_fields(values: Mapping[str, Any], where: str) -> tuple[str, ConfigFields]:
    """The family of a configuration, and the fields of its decoder. Of a model that also takes other inputs than text
    the decoder stands in `text_config`; its family is that of the whole model, or of `text_config` if only that is
    known."""
    inner = _decoder_values(values)
    outer = values.get("model_type")
    kind = outer if isinstance(outer, str) and outer in FAMILIES else inner.get("model_type")
    return str(kind), ConfigFields(inner, where)


def find_published(text: str) -> tuple[str, dict[str, Any]]:
    """Name and configuration of the model that `text` names: a preset (`deepseek-v3`), a config.json or its folder."""
    preset = MODELS / f"{text}.json"
    path = preset if preset.is_file() and not Path(text).exists() else Path(text)
    if not path.exists():
        known = sorted(p.stem for p in MODELS.glob("*.json"))
        raise unknown_value(text, known, "neither a file nor one of the models")
    config = read_config_values(path)
    folder = path if path.is_dir() else path.parent if path.name in ("config.json", FILE) else None
    return (folder.resolve().name if folder is not None else path.stem), config


def read_config_values(path: str | Path) -> dict[str, Any]:
    """The values of the config.json at `path`, or in the folder `path`, or those of its params.json. What modelopt
    writes beside a config.json, in hf_quant_config.json, stands as `quantization_config` if the configuration has
    none."""
    path = Path(path)
    path = config_file(path) if path.is_dir() else path
    values = read_json_object(path)
    if path.name == FILE:
        return params_values(values)
    beside = path.with_name(QUANTIZATION_FILE)
    if path.name == "config.json" and beside.is_file() and not _decoder_values(values).get("quantization_config"):
        quantization = read_json_object(beside).get("quantization")
        if not isinstance(quantization, dict):
            raise InputError(f"{beside}: quantization is {quantization!r}; it must be an object.")
        values["quantization_config"] = {"quant_method": "modelopt", **quantization}
    return values


def _decoder_values(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that describes the decoder. Where it does not give them itself it has weight form and special tokens
    from beside it; whether the head is tied is said beside it, if at all."""
    text = values.get("text_config")
    if not isinstance(text, Mapping):
        return values
    beside = ("quantization_config", "compression_config", "eos_token_id", "bos_token_id")
    outer = {key: values[key] for key in beside if values.get(key) is not None}
    if "torch_dtype" not in text and "dtype" not in text:
        outer |= {key: values[key] for key in ("torch_dtype", "dtype") if key in values}
    inner = {key: value for key, value in text.items() if value is not None or key not in outer}
    tied = {"tie_word_embeddings": values["tie_word_embeddings"]} if "tie_word_embeddings" in values else {}
    return {**outer, **inner, **tied}


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError naming the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}.") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}; a JSON object is needed.")
    return values
