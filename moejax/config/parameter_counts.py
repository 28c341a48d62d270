"""Counts of a model's parameters, and bytes of its experts."""

import jax

from moejax.config.model_config import LayerKind, ModelConfig, in_slots
from moejax.config.params import expert_feed_forward_specs, is_spec, param_specs


def expert_bytes(cfg: ModelConfig, itemsize: int = 4) -> int:
    """Bytes of the largest expert of any layer, with numbers of this size; 0 for a model without experts."""
    return itemsize * max((expert_size(cfg, kind) for kind in set(cfg.layer_kinds) if in_slots(kind)), default=0)


def expert_counts(cfg: ModelConfig) -> tuple[int, int]:
    """Parameters of all experts of a model, and of the experts that one token goes to."""
    kinds: list[LayerKind] = [kind for kind in cfg.layer_kinds if in_slots(kind)]
    total = sum(cfg.experts_of(kind).experts * expert_size(cfg, kind) for kind in kinds)
    return total, sum(cfg.experts_of(kind).experts_per_token * expert_size(cfg, kind) for kind in kinds)


def expert_size(cfg: ModelConfig, kind: LayerKind) -> int:
    """Parameters of one expert of a layer of this kind."""
    moe = cfg.experts_of(kind)
    one = expert_feed_forward_specs(cfg, moe, (), ())
    return sum(s.size for s in jax.tree.leaves(one, is_leaf=is_spec))


def parameter_count(cfg: ModelConfig) -> int:
    """All parameters of a model as published, each expert once. Router biases that the model does not have are left
    out."""
    total = sum(s.size for s in jax.tree.leaves(param_specs(cfg), is_leaf=is_spec))
    if cfg.moe is None or cfg.moe.router_bias:
        return total
    return total - cfg.moe.experts * cfg.layer_kinds.count("moe")
