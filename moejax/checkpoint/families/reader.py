"""Reads the config.json of a model to serve, or its params.json in Mistral's own format: a ModelConfig, or an error
that names the field."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moejax.checkpoint.families.afmoe import AFMOE
from moejax.checkpoint.families.conversion import serving_config
from moejax.checkpoint.families.deepseek import (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DEEPSEEK_V32,
    GLM4_MOE_LITE,
    GLM_MOE_DSA,
    KIMI_K2,
    KIMI_K25,
)
from moejax.checkpoint.families.ernie4_5_moe import ERNIE4_5_MOE
from moejax.checkpoint.families.exaone_moe import EXAONE_MOE
from moejax.checkpoint.families.family import ServedFamily
from moejax.checkpoint.families.gemma4 import GEMMA4, GEMMA4_TEXT
from moejax.checkpoint.families.glm4_moe import DOTS1, GLM4_MOE, GLM4V_MOE, SOLAR_OPEN
from moejax.checkpoint.families.gpt_oss import GPT_OSS
from moejax.checkpoint.families.granite_moe import GRANITE_MOE, GRANITE_MOE_SHARED
from moejax.checkpoint.families.hunyuan import HUNYUAN_V1_MOE, HY_V3
from moejax.checkpoint.families.kimi_linear import BAILING_HYBRID, KIMI_LINEAR
from moejax.checkpoint.families.laguna import LAGUNA
from moejax.checkpoint.families.lfm2_moe import LFM2_MOE
from moejax.checkpoint.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from moejax.checkpoint.families.llama4 import LLAMA4, LLAMA4_TEXT
from moejax.checkpoint.families.mimo_v2 import MIMO_V2_FLASH
from moejax.checkpoint.families.minimax_m2 import MINIMAX_M2
from moejax.checkpoint.families.mistral import MINISTRAL3, MISTRAL3, MISTRAL4
from moejax.checkpoint.families.mistral_format import MISTRAL_FORMAT
from moejax.checkpoint.families.mixtral import MIXTRAL
from moejax.checkpoint.families.nemotron_h import NEMOTRON_H
from moejax.checkpoint.families.olmoe import OLMOE
from moejax.checkpoint.families.phimoe import PHIMOE
from moejax.checkpoint.families.qwen3_next import QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT
from moejax.checkpoint.families.qwen_moe import QWEN2_MOE, QWEN3_MOE, QWEN3_VL_MOE
from moejax.checkpoint.families.special_tokens import end_token
from moejax.checkpoint.families.step3p5 import STEP3P5, STEP3P7
from moejax.config.config_values import ConfigError
from moejax.config.model_config import ModelConfig
from planner.errors import InputError
from planner.inputs.published import DRAFTS_SERVED, FAMILIES, draft_layers, published_model, read_config_values
from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.decoder import read_stop_tokens
from planner.inputs.published.mistral_format import BEGIN, FAMILY, config_file
from planner.inputs.published.reader import decoder_fields, read_json_object

SERVED_FAMILIES: dict[str, ServedFamily] = {
    "mixtral": MIXTRAL,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "olmoe": OLMOE,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "kimi_k2": KIMI_K2,
    "gpt_oss": GPT_OSS,
    "glm4_moe": GLM4_MOE,
    "granitemoe": GRANITE_MOE,
    "granitemoeshared": GRANITE_MOE_SHARED,
    "phimoe": PHIMOE,
    "glm4_moe_lite": GLM4_MOE_LITE,
    "dots1": DOTS1,
    "solar_open": SOLAR_OPEN,
    "minimax_m2": MINIMAX_M2,
    "hy_v3": HY_V3,
    "hunyuan_v1_moe": HUNYUAN_V1_MOE,
    "ernie4_5_moe": ERNIE4_5_MOE,
    "exaone_moe": EXAONE_MOE,
    "afmoe": AFMOE,
    "mimo_v2_flash": MIMO_V2_FLASH,
    "laguna": LAGUNA,
    "step3p5": STEP3P5,
    "step3p7": STEP3P7,
    "llama4": LLAMA4,
    "llama4_text": LLAMA4_TEXT,
    "kimi_k25": KIMI_K25,
    "qwen3_vl_moe": QWEN3_VL_MOE,
    "glm4v_moe": GLM4V_MOE,
    "qwen3_next": QWEN3_NEXT,
    "qwen3_5_moe": QWEN3_5_MOE,
    "qwen3_5": QWEN3_5,
    "lfm2_moe": LFM2_MOE,
    "nemotron_h": NEMOTRON_H,
    "kimi_linear": KIMI_LINEAR,
    "bailing_hybrid": BAILING_HYBRID,
    "deepseek_v32": DEEPSEEK_V32,
    "glm_moe_dsa": GLM_MOE_DSA,
    "ministral3": MINISTRAL3,
    "mistral4": MISTRAL4,
    "mistral3": MISTRAL3,
    FAMILY: MISTRAL_FORMAT,
    "gemma4": GEMMA4,
    "gemma4_text": GEMMA4_TEXT,
}
"""The families of `planner.inputs.published` that are served, by `model_type`."""

WITHOUT_MTP = "Serve it with --speculate ngram or off."
"""The way out for a model that cannot draft."""
ONLY = {"hidden_act": "silu", "pretraining_tp": 1}
"""Fields that no served family may have with another value."""


def read_config(
    source: str | Path | Mapping[str, Any],
    *,
    name: str | None = None,
    max_context: int | None = None,
    mtp: bool = False,
) -> ModelConfig:
    """The model that a config.json or params.json describes: `source` is its folder, its path, or its values.

    `name` is the folder's unless given. `max_context` serves a shorter context than the published one. From a folder,
    the stop tokens of generation_config.json and the begin and end tokens of the tokenizer's files are read too. With
    `mtp` it has its layer of multi-token prediction, which must be one.
    Raises ConfigError for an architecture that is not served, a missing field, or fields that contradict.
    """
    where, folder = "config.json", None
    try:
        if isinstance(source, Mapping):
            values: Mapping[str, Any] = source
        else:
            path = Path(source)
            path = config_file(path) if path.is_dir() else path
            where, folder = str(path), path.parent
            values = read_config_values(path)
        f = _served_fields(values, where)
        model = published_model(values, where)
        if folder is not None:
            model = dataclasses.replace(model, stop_tokens=_stop_tokens(folder, model.stop_tokens))
        bos = None if folder is None else _bos_token(folder, f)
        cfg = serving_config(model, name=name or (folder.name if folder else model.family), max_context=max_context)
        return dataclasses.replace(cfg, bos_token=bos, mtp=mtp and _has_mtp(values, cfg))
    except InputError as error:
        raise ConfigError(str(error)) from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _has_mtp(values: Mapping[str, Any], cfg: ModelConfig) -> bool:
    """True for a model with one layer of multi-token prediction that is served. Raises ConfigError for another."""
    layers = draft_layers(values)
    if layers != 1:
        raise ConfigError(f"{cfg.name} has {layers} layers of multi-token prediction, and 1 is served. {WITHOUT_MTP}")
    if cfg.family not in DRAFTS_SERVED:
        raise ConfigError(
            f"the layer of multi-token prediction of model_type {cfg.family!r} is not served yet; that of "
            f"{', '.join(sorted(DRAFTS_SERVED))} is. {WITHOUT_MTP}"
        )
    return True


def _served_fields(values: Mapping[str, Any], where: str) -> ConfigFields:
    """The fields of the decoder, once the `model_type` and the fields that a family restricts are checked."""
    kind, f = decoder_fields(values, where)
    architectures = ConfigFields(values, where).listed("architectures", str, ())
    family = SERVED_FAMILIES.get(kind)
    if family is None:
        known = ", ".join(sorted(SERVED_FAMILIES))
        named = values.get("model_type")
        raise f.error(
            f"model_type is {named!r} (architectures {list(architectures)}), which is not served; served are {known}"
        )
    for architecture in architectures:
        if architecture not in FAMILIES[kind].architectures:
            classes = " or ".join(FAMILIES[kind].architectures)
            raise f.error(f"architectures names {architecture}, but model_type {kind!r} is {classes}")
    for key, value in (ONLY | dict(family.only)).items():
        if f.has(key) and f.values[key] != value:
            raise f.error(f"{key} is {f.values[key]!r}; only {value!r} is served")
    return f


def _stop_tokens(folder: Path, stop: tuple[int, ...]) -> tuple[int, ...]:
    path, end = folder / "generation_config.json", end_token(folder)
    found = read_stop_tokens(ConfigFields(read_json_object(path), str(path))) if path.is_file() else ()
    return tuple(dict.fromkeys((*stop, *found, *(() if end is None else (end,)))))


def _bos_token(folder: Path, f: ConfigFields) -> int | None:
    """`bos_token_id` if the tokenizer puts it in front of every text; most do not. In Mistral's own format it does,
    unless the tokenizer's files say otherwise."""
    path = folder / "tokenizer_config.json"
    if f.values.get("model_type") == FAMILY and not path.is_file():
        return BEGIN
    if not f.has("bos_token_id") or not path.is_file():
        return None
    return f.integer("bos_token_id", least=0) if read_json_object(path).get("add_bos_token") else None
