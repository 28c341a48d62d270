"""Models in Mistral's own format: `params.json` beside `consolidated*.safetensors`, in place of config.json.

Mistral Large 3 and Small 4 (latent attention, experts and a shared expert), dense models with and without queries that
grow with position, and Mixtral. Fields are read as vLLM reads them with `config_format mistral`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.decoder import read_decoder, read_dense_layers, read_experts
from planner.inputs.published.deepseek import read_latent_decoder
from planner.inputs.score_growth import PublishedScoreGrowth

FILE = "params.json"
FAMILY = "mistral_format"
"""The `model_type` that these models go by here: their file names none."""
BEGIN, END = 1, 2
"""The tokens `<s>` and `</s>` of every tokenizer of Mistral, which `params.json` does not name."""
CONTEXT = 128_000
"""Of a file that does not say it."""

_NAMES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
}
_LATENT_NAMES = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_YARN = ("original_max_position_embeddings", "factor", "apply_scale", "beta", "alpha")
_FIXED = {"activation": "silu", "use_biases": False}
"""Fields that may be absent or have this value."""
_FIXED_OF_EXPERTS = {
    "route_every_n": 1,
    "num_expert_groups": 1,
    "num_expert_groups_per_tok": 1,
    "renorm_strategy": "WEIGHTS",
    "use_load_balancing_bias": False,
}


def config_file(folder: Path) -> Path:
    """The file in a published folder that describes the model: `params.json` where there is no config.json, or where
    config.json has no weights beside it (`model*.safetensors`); else config.json."""
    params, config = folder / FILE, folder / "config.json"
    own = params.is_file() and not (config.is_file() and any(folder.glob("model*.safetensors")))
    return params if own else config


def params_values(params: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a `params.json` with a `model_type`, and its quantization where other configurations have it."""
    values = dict(params)
    if values.get("model_type", "transformer") == "transformer":
        values["model_type"] = FAMILY
    given = values.pop("quantization", None)
    if isinstance(given, Mapping):
        values["quantization_config"] = _quantization(given)
    return values


def _quantization(given: Mapping[str, Any]) -> dict[str, Any]:
    """FP8 with a scale for each tensor as Mistral names it, or what compressed-tensors wrote."""
    if given.get("qformat_weight") == "fp8_e4m3":
        return {"quant_method": "fp8"}
    method = str(given.get("quant_method") or given.get("qformat_weight")).lower().replace("_", "-")
    return {**given, "quant_method": method}


def read_mistral_format(f: ConfigFields) -> dict[str, Any]:
    """Any of these models. Raises InputError naming the field of `params.json` that is missing or not served."""
    _check_fixed(f, _FIXED)
    moe = f.nested("moe")
    if moe is not None:
        _check_fixed(moe, _FIXED_OF_EXPERTS)
    is_latent = f.has("qk_nope_head_dim")
    g = _translated(f, is_latent=is_latent)
    found = _read_latent(f, g, moe) if is_latent else _read_plain(f, g, moe)
    return found | {"score_growth": _score_growth(f)}


def _read_latent(f: ConfigFields, g: ConfigFields, moe: ConfigFields | None) -> dict[str, Any]:
    """DeepSeek-V3's attention and experts; gates are shares of a softmax over the chosen ones."""
    if moe is None or not moe.integer("num_shared_experts", 0, null=0, least=0):
        raise f.error("qk_nope_head_dim is given, but no num_shared_experts of moe; only both together are served")
    width = moe.integer("expert_hidden_dim")
    experts = read_experts(
        moe,
        per_token=None,
        width=width,
        d_shared=moe.integer("num_shared_experts") * width,
        gate="biased_share",
        normalised=True,
        gate_scale=moe.number("routed_scale", 1.0),
    )
    plain = read_latent_decoder(g, experts, context=CONTEXT, stop=(END,))
    dense = ConfigFields({**moe.values, "num_hidden_layers": plain["layers"]}, moe.where)
    return plain | read_dense_layers(dense, 0)


def _read_plain(f: ConfigFields, g: ConfigFields, moe: ConfigFields | None) -> dict[str, Any]:
    """A dense model, or Mixtral: gates are a softmax over the chosen experts."""
    plain = read_decoder(g, context=CONTEXT, stop=(END,))
    experts = None if moe is None else read_experts(moe, per_token=None, width=plain["dense_width"])
    return plain | {"experts": experts, "windows": _windows(f, plain["layers"])}


def _translated(f: ConfigFields, *, is_latent: bool) -> ConfigFields:
    """The fields by the names that other configurations have for them."""
    values = {name: f.integer(key) for key, name in _NAMES.items()}
    values |= {
        "num_key_value_heads": f.integer("n_kv_heads", values["num_attention_heads"]),
        "rms_norm_eps": f.number("norm_eps"),
        "tie_word_embeddings": f.flag("tied_embeddings", False),
        "max_position_embeddings": _context(f),
        "rope_parameters": _rope(f, is_latent=is_latent),
    }
    if is_latent:
        values |= {name: f.integer(name) for name in _LATENT_NAMES}
    elif f.has("head_dim"):
        values["head_dim"] = f.integer("head_dim")
    return ConfigFields(values, f.where)


def _context(f: ConfigFields) -> int:
    """The smaller of the two lengths that a file may name."""
    stretched = f.integer("max_position_embeddings", CONTEXT)
    return min(stretched, f.integer("max_seq_len", stretched))


def _rope(f: ConfigFields, *, is_latent: bool) -> dict[str, Any]:
    """The rotary embedding. With `apply_scale` YaRN scales scores too: as DeepSeek does it in latent attention, else by
    the rotated vectors."""
    base, yarn = f.number("rope_theta"), f.nested("yarn")
    if yarn is None:
        return {"rope_type": "default", "rope_theta": base}
    if unknown := sorted(yarn.values.keys() - _YARN):
        raise yarn.error(f"{unknown[0]} is not known; known are {', '.join(_YARN)}")
    scaled = {"mscale": 1.0, "mscale_all_dim": 1.0} if is_latent else {}
    return {
        "rope_type": "yarn",
        "rope_theta": base,
        "factor": yarn.number("factor"),
        "original_max_position_embeddings": yarn.integer("original_max_position_embeddings"),
        "beta_fast": yarn.number("beta", 32.0),
        "beta_slow": yarn.number("alpha", 1.0),
        **(scaled if yarn.flag("apply_scale", True) else {"attention_factor": 1.0}),
    }


def _windows(f: ConfigFields, layers: int) -> tuple[int | None, ...]:
    """The window of each layer: one for all, or a list that repeats, in which null is a layer without one."""
    given = f.values.get("sliding_window")
    pattern: list[Any] = given if isinstance(given, list) and given else [given]
    if layers % len(pattern):
        raise f.error(f"sliding_window has {len(pattern)} entries, and n_layers, {layers}, is no multiple of them")
    for window in pattern:
        if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
            raise f.error(f"sliding_window is {given!r}; it must be a whole number of at least 1, or a list of them")
    return tuple(pattern) * (layers // len(pattern))


def _score_growth(f: ConfigFields) -> PublishedScoreGrowth | None:
    scaling = f.nested("llama_4_scaling")
    beta = scaling.number("beta") if scaling is not None else 0.0
    if scaling is None or not beta:
        return None
    every = scaling.integer("original_max_position_embeddings")
    return PublishedScoreGrowth(scale=beta, every=every, first=0, all_layers=True)


def _check_fixed(f: ConfigFields, fixed: Mapping[str, Any]) -> None:
    for key, value in fixed.items():
        if f.has(key) and f.values[key] != value:
            raise f.error(f"{key} is {f.values[key]!r}; only {value!r} is served")
