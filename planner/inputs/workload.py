"""The model in numbers: how many bytes it holds and moves and how many flops it takes per token."""

from __future__ import annotations

from dataclasses import dataclass, fields

from planner.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One model. Sizes in bytes, work in flops (a multiply-add is two).

    `moe_layers`, `experts`, `experts_per_token` and `expert_bytes` are all 0 for a dense model, else at least 1.

    `rest_bytes` is everything but the routed experts (attention, shared experts, dense layers, router,
    embeddings), held by every rank when attention is data-parallel. `hidden_bytes` is one token's
    hidden state on the wire. `context_flops` is attention's work per token and per token of context.
    `cache_bytes_per_request` is what layers with a sliding window keep; `cache_splits` is how many tensor
    ranks the cache can be divided among (1 for a latent cache, the kv heads otherwise). `dense_bytes` and
    `attention_bytes` are the parts of `rest_bytes` that dense and tensor groups divide.
    """

    moe_layers: int
    experts: int
    experts_per_token: int
    expert_bytes: int
    name: str = "model"
    layers: int = 0
    rest_bytes: int = 0
    dense_bytes: int = 0
    attention_bytes: int = 0
    cache_bytes_per_token: int = 0
    cache_bytes_per_request: int = 0
    cache_splits: int = 1
    heads: int = 1
    page_tokens: int = 16
    hidden_bytes: int = 0
    expert_flops: float = 0.0
    rest_flops: float = 0.0
    context_flops: float = 0.0
    weight_format: str = "bfloat16"
    total_parameters: int = 0
    active_parameters: int = 0

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("name", "weight_format"):
                continue
            if not isinstance(value, (int, float)) or isinstance(value, bool) or value < 0:
                raise InputError(f"workload {self.name!r}: {f.name} is {value!r}, it must be at least 0")
        routed = ("moe_layers", "experts", "experts_per_token", "expert_bytes")
        dense = not any(getattr(self, name) for name in routed)
        for name in ("page_tokens", "heads") + (() if dense else routed):
            if getattr(self, name) < 1:
                raise InputError(f"workload {self.name!r}: {name} is {getattr(self, name)}, it must be at least 1")
        if self.experts_per_token > self.experts:
            raise InputError(
                f"workload {self.name!r}: {self.experts_per_token} experts per token out of {self.experts}"
            )

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot on every MoE layer: what one more slot per rank costs a rank."""
        return self.moe_layers * self.expert_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of one cache page over all layers."""
        return self.page_tokens * self.cache_bytes_per_token
