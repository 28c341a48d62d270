"""The models, chips and engines of measured settings: the shipped configuration that a row's `model_path` names, the
preset that its `system` names, and one spelling of each engine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from planner.errors import InputError
from planner.inputs.cluster import PRESETS, Cluster, read_cluster
from planner.inputs.published import MODELS, PublishedModel, find_published, published_model

SAME = {
    "deepseek-r1": "deepseek-v3",
    "deepseek-v3.1": "deepseek-v3",
    "deepseek-r1-distill-llama-70b": "llama-3.1-70b",
    "deepseek-r1-distill-llama-8b": "llama-3.1-8b",
    "deepseek-r1-distill-qwen-32b": "qwen2.5-32b",
    "deepseek-r1-distill-qwen-14b": "qwen2.5-14b",
    "deepseek-r1-distill-qwen-7b": "qwen2.5-7b",
    "glm-4.6": "glm-4.5",
    "glm-4.7": "glm-4.5",
    "kimi-k2.5": "kimi-k2",
    "llama-3-70b": "llama-3.1-70b",
    "llama-3-8b": "llama-3.1-8b",
    "llama-3.3-70b": "llama-3.1-70b",
    "minimax-m2": "minimax-m2.5",
    "minimax-m2.1": "minimax-m2.5",
    "qwq-32b": "qwen2.5-32b",
}
"""Names of models with the matrices of another, whose name stands for both in the tables of errors."""

SIZES: Mapping[str, tuple[str, dict[str, int]]] = {
    "qwen3-4b": (
        "qwen3-8b",
        {"hidden_size": 2560, "num_hidden_layers": 36, "intermediate_size": 9728, "tie_word_embeddings": True},
    ),
    "qwen3-14b": (
        "qwen3-8b",
        {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 17408},
    ),
    "qwen2.5-14b": (
        "qwen2.5-7b",
        {
            "hidden_size": 5120,
            "num_hidden_layers": 48,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "intermediate_size": 13824,
        },
    ),
    "qwen2.5-32b": (
        "qwen2.5-7b",
        {
            "hidden_size": 5120,
            "num_hidden_layers": 64,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "intermediate_size": 27648,
        },
    ),
    "qwen2.5-72b": (
        "qwen2.5-7b",
        {
            "hidden_size": 8192,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "intermediate_size": 29568,
        },
    ),
}
"""Models that no shipped configuration describes: one with matrices of this kind, and the sizes that differ."""


ENGINES = {"tensorrtllm": "trtllm", "sgl": "sglang"}
"""Names of engines, without case, blanks and hyphens, beside the one under which their errors stand."""
NOT_GIVEN = "not given"
"""The name of what a row leaves empty."""

KnownModel = tuple[str, PublishedModel]
"""The name of a model in the tables of errors, and its configuration."""


def read_configs(files: Mapping[str, str]) -> dict[str, KnownModel]:
    """The models of config.json files, each by the `model_path` that it is given for."""
    found = {path: find_published(file) for path, file in files.items()}
    return {path: (name, published_model(values, name)) for path, (name, values) in found.items()}


def measured_name(name: str) -> str:
    """The name under which a model's errors stand (`SAME`)."""
    return SAME.get(name, name)


@lru_cache
def find_measured(path: str) -> KnownModel | None:
    """The name and the configuration of the model that the `model_path` of a row names; None for one that is not
    known.

    Its last part is compared, without what says the vendor or the form of the weights: the longest known name with
    which it begins, up to a hyphen or its end.
    """
    text = re.sub(r"^(meta|nvidia)-", "", path.lower().rstrip("/").rsplit("/", 1)[-1].replace("_", "-"))
    known = {p.stem for p in MODELS.glob("*.json")} | set(SAME) | set(SIZES)
    found = [name for name in known if text == name or text.startswith(f"{name}-")]
    if not found or ("distill" in text and "distill" not in max(found, key=len)):
        return None
    name = measured_name(max(found, key=len))
    base, sizes = SIZES.get(name, (name, {}))
    values: dict[str, Any] = {**find_published(base)[1], **sizes}
    return name, published_model(values, name)


def engine_name(backend: str) -> str:
    """The name under which the errors of the engine of a row stand, however its `backend` spells it."""
    text = re.sub(r"[\s_-]+", "", backend.lower())
    return ENGINES.get(text, text) or NOT_GIVEN


@lru_cache
def find_chip(system: str) -> Cluster | None:
    """The cluster that describes the chip a row's `system` names, such as `h100_sxm`; None for one that is not known,
    and for forms of a chip with other links."""
    words = re.split(r"[^a-z0-9]+", system.lower())
    named = [word for word in words if (PRESETS / f"{word}.toml").is_file()]
    if len(named) != 1 or {"pcie", "nvl"} & set(words):
        return None
    try:
        return read_cluster(named[0])
    except InputError:
        return None
