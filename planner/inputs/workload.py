"""The model in numbers: how many bytes it holds and moves and how many flops it takes per token."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from planner.errors import InputError
from planner.inputs.layer_states import STATES_PER_REQUEST

MAX_DRAFTS = 15
"""Most drafts by look-up that a request has in a step of `moejax serve`."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One model. Sizes in bytes, work in flops (a multiply-add is two).

    `moe_layers`, `experts`, `experts_per_token` and `expert_bytes` are all 0 for a dense model, else at least 1.

    `rest_bytes` is everything but the routed experts (attention, shared experts, dense layers, router,
    embeddings), held by every rank when attention is data-parallel. `hidden_bytes` is one token's
    hidden state on the wire. `context_flops` is attention's work per token and per token of context.
    `cache_format` is that of keys and values, whose bytes are counted with their scales, if the format has some.
    `cache_bytes_per_request` is what layers with a sliding window (or chunks) of `cache_window` tokens keep, once a
    request is as long as that; `cache_splits` is how many tensor ranks the cache can be sharded over (1 for a latent
    cache, the kv heads otherwise). `state_bytes` is one state of a request, where layers have a state in place of keys
    and values; a rank holds STATES_PER_REQUEST for each request that it can run. `dense_bytes` and
    `attention_bytes` are the parts of `rest_bytes` that dense and tensor groups shard, `lookup_bytes` the part of which
    a step reads single rows only (the embeddings, where the head is another matrix).

    `drafts` tokens are drafted in each step and verified in the next: by one more layer (multi-token prediction, MTP),
    or with `draft_layers` 0 by the front, from the request's own text. Each is kept with the probability `accepted`
    when those before it were.

    `head_flops` is the part of `rest_flops` that only the last token of a prompt takes. `prompt_context_flops` is
    `context_flops` for the tokens of a prompt (0: the same), `windowed_share` the share of layers that see
    `cache_window` tokens at most. `kernels` is the number of kernels that one step launches, `groups_used` the most
    groups of experts that a token is routed to (0: any).
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
    cache_window: int = 0
    state_bytes: int = 0
    cache_splits: int = 1
    heads: int = 1
    page_tokens: int = 16
    hidden_bytes: int = 0
    expert_flops: float = 0.0
    rest_flops: float = 0.0
    context_flops: float = 0.0
    head_flops: float = 0.0
    prompt_context_flops: float = 0.0
    windowed_share: float = 0.0
    lookup_bytes: int = 0
    kernels: int = 0
    groups_used: int = 0
    drafts: int = 0
    accepted: float = 0.0
    draft_layers: int = 1
    weight_format: str = "bfloat16"
    cache_format: str = "float32"
    total_parameters: int = 0
    active_parameters: int = 0

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("name", "weight_format", "cache_format"):
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
        """Bytes of one slot on every MoE layer, the one that drafts among them: what one more slot per rank costs a
        rank."""
        return (self.moe_layers + min(self.draft_layers, self.drafts)) * self.expert_bytes

    @property
    def all_bytes(self) -> int:
        """Bytes of all weights, each once."""
        return self.rest_bytes + self.moe_layers * self.experts * self.expert_bytes

    @property
    def kept(self) -> float:
        """Tokens that a request gets from a step, on average."""
        return sum(self.accepted**i for i in range(self.drafts + 1))

    @property
    def head_bytes(self) -> float:
        """Bytes of the head, in 16-bit numbers."""
        return self.head_flops

    @property
    def layer_bytes(self) -> float:
        """Bytes of a layer without its experts, on average."""
        return max(0.0, self.rest_bytes - self.lookup_bytes - self.head_bytes) / max(1, self.layers)

    def with_drafts(self, drafts: int, accepted: float, *, layers: int = 1) -> Workload:
        """This model with `drafts` tokens drafted in each step: by one of `layers` of its own, with the weights and the
        cache of that layer, or with 0 layers by look-up.

        Raises InputError for numbers out of range.
        """
        if drafts < 1 or not 0 <= accepted <= 1:
            flag = "--mtp" if layers else "--ngram"
            raise InputError(f"{flag}: drafts={drafts}, accepted={accepted:g}; drafts at least 1, accepted from 0 to 1")
        if not layers and drafts > MAX_DRAFTS:
            raise InputError(
                f"--ngram: drafts={drafts}, and a request of `moejax serve` has at most {MAX_DRAFTS} in a step. Give "
                f"drafts=1 to {MAX_DRAFTS}."
            )
        if not layers:
            return replace(self, drafts=drafts, accepted=accepted, draft_layers=0)
        more = 1 + 1 / max(1, self.layers)
        return replace(
            self,
            drafts=drafts,
            accepted=accepted,
            rest_bytes=round(self.rest_bytes + self.layer_bytes),
            attention_bytes=round(self.attention_bytes * more),
            cache_bytes_per_token=round(self.cache_bytes_per_token * more),
        )

    def cache_bytes(self, context: float) -> float:
        """Bytes that a request with `context` tokens keeps in the cache, one state of it among them."""
        filled = min(1.0, context / self.cache_window) if self.cache_window else 1.0
        return context * self.cache_bytes_per_token + filled * self.cache_bytes_per_request + self.state_bytes

    def room_bytes(self, context: float) -> float:
        """Bytes that a rank needs to run a request of `context` tokens: its cache, with all copies of its state and its
        share of the snapshots."""
        return self.cache_bytes(context) + (STATES_PER_REQUEST - 1) * self.state_bytes

    def seen(self, context: float) -> float:
        """Tokens that a token with `context` before it attends to, on average over the layers."""
        return context - self.windowed_share * max(0.0, context - self.cache_window)

    @property
    def page_bytes(self) -> int:
        """Bytes of one cache page over all layers."""
        return self.page_tokens * self.cache_bytes_per_token
