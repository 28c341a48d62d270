"""The planner's Workload of a published model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from planner.errors import InputError, unknown_key
from planner.inputs.published.model import PublishedModel
from planner.inputs.published.parameter_counts import (
    ParameterCounts,
    cache_elements,
    cache_number_bytes,
    count_parameters,
)
from planner.inputs.published.quantization import BYTES
from planner.inputs.published.reader import find_published, published_model
from planner.inputs.workload import Workload


def read_model(text: str, *, weights: str | None = None, cache: str = "bfloat16") -> Workload:
    """The workload of a preset (`deepseek-v3`), a `config.json`, its folder, or a JSON of Workload fields."""
    name, values = find_published(text)
    return workload_from(values, name=name, where=text, weights=weights, cache=cache)


def workload_from(
    values: Mapping[str, Any],
    *,
    name: str = "model",
    where: str = "config.json",
    weights: str | None = None,
    cache: str = "bfloat16",
) -> Workload:
    """The workload of the values of a config.json, or of Workload fields; `where` names the file in errors.

    `weights` overrides the format of the weights, `cache` is that of the cache (both of `BYTES`).
    """
    if is_published(values):
        return workload_of(published_model(values, where, weights=weights), name=name, cache=cache)
    known = [f.name for f in fields(Workload)]
    for key in values:
        if key not in known:
            raise unknown_key(key, known, where)
    return Workload(**{"name": name, **values})


def is_published(values: Mapping[str, Any]) -> bool:
    """Whether these are the values of a config.json, not Workload fields."""
    return "moe_layers" not in values or "model_type" in values


DRAFT_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")


DRAFTS_SERVED = frozenset({"deepseek_v3", "kimi_k2", "kimi_k25", "glm4_moe", "glm4v_moe", "glm4_moe_lite"})
"""The `model_type`s whose layer for multi-token prediction `moejax serve` runs."""


def draft_layers(values: Mapping[str, Any]) -> int:
    """The number of layers for multi-token prediction that a config.json says the model has."""
    places = (values, values.get("text_config") or {})
    return max(int(place.get(name) or 0) for place in places for name in DRAFT_LAYERS)


def workload_of(
    model: PublishedModel, *, name: str = "model", cache: str = "bfloat16", cache_scales: bool = True
) -> Workload:
    """The workload of a model. `cache_scales` is false for engines whose caches have no scale for each head.

    Flops are two per parameter and token; attention adds, per layer and token of context, two products with all heads
    (of all positions, also where an indexer chooses, as `moejax serve` computes them), and an indexer one of its own.
    Raises InputError for a weight form or a cache format that is not known.
    """
    if cache not in BYTES:
        raise unknown_key(cache, BYTES, "--cache")
    form = model.form
    if form.problem:
        raise InputError(form.problem)
    p = count_parameters(model)
    latent = model.latent
    (per_token, per_request), cached = cache_elements(model), cache_number_bytes(model, cache, scales=cache_scales)
    products, in_prompts = _attention_products(model)
    dense, attention = p.dense * form.dense, p.attention * form.attention
    low = (p.embedding + p.head + p.norms + p.router) * form.base
    return Workload(
        name=name,
        layers=model.layers,
        moe_layers=p.moe_layers,
        experts=p.experts,
        experts_per_token=p.experts_per_token,
        expert_bytes=round(p.expert * form.experts),
        rest_bytes=round(low + dense + attention + p.shared * form.shared),
        dense_bytes=round(dense),
        attention_bytes=round(attention),
        cache_format=cache,
        cache_bytes_per_token=round(per_token * cached),
        cache_bytes_per_request=round(per_request * cached),
        cache_window=(model.window or 0) if per_request else 0,
        state_bytes=4 * model.state_elements,
        cache_splits=math.gcd(*(kind.kv_heads for kind, _ in model.kinds_of_attention)) if latent is None else 1,
        heads=model.heads,
        hidden_bytes=model.hidden_size * 2,
        expert_flops=2.0 * p.expert,
        rest_flops=2.0 * (p.rest - (p.embedding if p.head else 0)),
        head_flops=2.0 * (p.head or p.embedding),
        context_flops=2.0 * products,
        prompt_context_flops=2.0 * in_prompts,
        windowed_share=sum(w is not None for w in model.windows) / model.layers if per_request else 0.0,
        lookup_bytes=round(p.embedding * form.base) if p.head else 0,
        kernels=_kernels(model, p),
        groups_used=model.experts.groups_used if model.experts and model.experts.groups > 1 else 0,
        weight_format=form.format,
        total_parameters=p.total,
        active_parameters=p.active,
    )


def _attention_products(model: PublishedModel) -> tuple[int, int]:
    """Numbers that attention of all layers multiplies for one position of the context: while decoding, and in prompts,
    where latent attention computes keys and values."""
    scored = 0 if model.indexer is None else model.indexer.heads * model.indexer.d_key
    latent = model.latent
    if latent is not None:
        each = 2 * latent.d_latent + latent.d_rope, latent.d_plain + latent.d_rope + latent.d_value
        decode, prompt = (model.attention_layers * (model.heads * products + scored) for products in each)
        return decode, prompt
    kinds = model.kinds_of_attention
    total = sum(n * kind.heads * (kind.head_size + kind.value_numbers) for kind, n in kinds)
    return total, total


def _kernels(model: PublishedModel, p: ParameterCounts) -> int:
    """The kernels that engines launch for one step, counted by part of a layer: norms, projections, rotation, attention
    and its output (8), norms of queries and keys (2), the projections of latent attention (5), scaling of narrow inputs
    (2); a dense feed-forward part (3), routing, sorting and two products of experts (6), a shared expert (3). An
    indexer has 15 in SGLang: three projections, a norm, rotation and two copies, two transforms, two scalings, the
    write to its cache, two of the weights of heads, the scores and their choice."""
    narrow = min(model.form.attention, model.form.dense) < 2
    latent = 5 * (model.latent is not None) + 15 * (model.indexer is not None)
    attention = 8 + 2 * (model.qk_norm != "none") + latent + 2 * narrow
    routed = 6 + 3 * bool(p.shared)
    dense = model.layers - p.moe_layers - len(model.bare_layers)
    return model.layers * attention + dense * 3 + p.moe_layers * routed
