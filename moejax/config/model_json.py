"""The fields of a model's configuration as `config.json` has them, in this release and in earlier ones."""

from typing import Any

from moejax.config.attention_config import (
    DeltaNetConfig,
    IndexerConfig,
    KimiDeltaConfig,
    LatentConfig,
    Mamba2Config,
    RopeScaling,
    ScoreGrowth,
    ShortConvolutionConfig,
    WindowedConfig,
)
from moejax.config.config_values import build_config
from moejax.config.moe_config import MoEConfig
from moejax.config.packed_form import PackedForm
from planner.inputs.routed_experts import RoutedExperts

_STORED_NAMES = {"shard_dense": "divide_dense"}
"""Fields under another name in `config.json`: folders written before a field was renamed stay readable."""
_LATER = {"cache_format": "float32", "mtp": False, "short_convolution": None, "d_value": None, "value_scale": 1.0}
_LATER |= {"packed": None, "windowed": None, "gate_by_head": False, "gate_function": "sigmoid"}
_LATER |= {"expert_limits": (), "dense_limits": ()}
_LATER |= {"value_norm": False, "keys_as_values": False, "layer_scales": False, "logit_cap": None}
_LATER |= {"mamba": None, "kimi_delta": None, "bare_layers": (), "activation": "swiglu"}
"""Fields that are written only where they differ from these, which earlier releases mean."""
_LATER_EXPERTS = ("sum_epsilon", "expert_limit", "dense_limit", "logit_cap", "activation", "d_latent")
_LATER_EXPERTS += ("own_norms", "expert_scales")
"""Fields of experts that are written only where they differ from their defaults."""
_LATER_PACKED = {"numbers": "4-bit", "rows": 1}
"""Fields of a published form that are written only where they differ from these."""
_LATER_SCALING = {"pairs": 0}
"""Fields of scaled rotary embeddings that are written only where they differ from these."""

_NESTED = {
    "moe": MoEConfig,
    "packed": PackedForm,
    "latent": LatentConfig,
    "indexer": IndexerConfig,
    "delta_net": DeltaNetConfig,
    "short_convolution": ShortConvolutionConfig,
    "mamba": Mamba2Config,
    "kimi_delta": KimiDeltaConfig,
    "rope_scaling": RopeScaling,
    "windowed": WindowedConfig,
    "score_growth": ScoreGrowth,
}


def written_values(fields: dict[str, Any]) -> dict[str, Any]:
    """A model's fields as `config.json` has them. Earlier releases do not read later fields, and what they wrote stays
    the same."""
    values: dict[str, Any] = {_STORED_NAMES.get(name, name): value for name, value in fields.items()}
    for name, default in _LATER.items():
        if values[name] == default:
            del values[name]
    experts: dict[str, Any] = values["moe"] or {}
    for name in _LATER_EXPERTS:
        if name in experts and experts[name] == getattr(RoutedExperts, name):
            del experts[name]
    packed: dict[str, Any] = values.get("packed") or {}
    for name, default in _LATER_PACKED.items():
        if name in packed and packed[name] == default:
            del packed[name]
    for scaling in (values["rope_scaling"], (values.get("windowed") or {}).get("rope_scaling")):
        for name, default in _LATER_SCALING.items():
            if scaling and scaling[name] == default:
                del scaling[name]
    return values


def read_values(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a model from what `written_values` made. Raises ConfigError on an unknown or missing key of a
    part."""
    fields = dict(values)
    for name, stored in _STORED_NAMES.items():
        if stored in fields:
            fields[name] = fields.pop(stored)
    for key, kind in _NESTED.items():
        if fields.get(key) is None:
            continue
        within = fields[key]
        if kind is WindowedConfig and within["rope_scaling"] is not None:
            within["rope_scaling"] = build_config(RopeScaling, within["rope_scaling"], "rope_scaling")
        fields[key] = build_config(kind, within, key)
    return fields
