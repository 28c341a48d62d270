"""The routed experts of a model, and how the router weighs them: the numbers that planner and server share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["swiglu", "geglu", "relu2"]
"""Of a feed-forward part: SwiGLU or GEGLU, whose GELU is that of tanh (arXiv 2002.05202 and 1606.08415), or the square
of relu without a gate (arXiv 2109.08668)."""
RouterGate = Literal["softmax", "one", "share", "biased_share", "sigmoid", "sparsemixer", "input_sigmoid"]


@dataclass(frozen=True, kw_only=True)
class RoutedExperts:
    """The routed part of a Mixture-of-Experts layer: `experts` of width `d_expert`, of which a token uses
    `experts_per_token`.

    `gate` says how the scores of the k chosen experts become weights: `softmax` over the chosen (Mixtral, arXiv
    2401.04088), `share` of the softmax over all (OLMoE, arXiv 2409.02060), `biased_share` the same, chosen by that
    share plus the router's bias (ERNIE 4.5 technical report, 2025), `sigmoid` of each, chosen by sigmoid plus the
    router's bias (DeepSeek-V3, arXiv 2412.19437), `sparsemixer` (Phi-3.5-MoE, arXiv 2409.12136: each choice against
    those within `jitter` of it), `input_sigmoid` (Llama 4: the sigmoid scales the expert's input), or `one` (each
    chosen expert counts in full: experts that are a split of a dense FFN).

    The weights are divided by their sum plus `sum_epsilon` if `normalised`, then multiplied by `gate_scale`. With
    `groups` > 1 only experts of the best `groups_used` groups can be chosen; a group counts by its best expert
    (`share`) or the sum of its two best (`sigmoid`, and `biased_share`: Mistral 4, without a bias).

    With a `logit_cap` c the router's logits x become c * tanh(x / c) first (Laguna). `expert_limit` bounds the gate of
    routed experts after its activation, and what it is multiplied with from both sides; `dense_limit` those of shared
    experts and of dense layers (Step-3.5).

    `router_bias` says that the router's bias is a published parameter, not zeros. `expert_bias` gives experts biases,
    `swiglu_limit` bounds their SwiGLU as gpt-oss does. `d_shared` is the width of the shared expert (0 without one);
    `shared_gate` weights it by a sigmoid of its own (Qwen2-MoE). `activation` is that of all of them. With `d_latent`
    the routed experts take and give so many numbers, to which and from which two projections lead (Nemotron 3 Super).

    With `own_norms` the shared expert has norms of its own before and after it, the sum of the routed ones has one
    after it, and the router takes rows that are normed for it and divided by the root of their size. With
    `expert_scales` the weight of each chosen expert is multiplied by a number of that expert (Gemma 4 has both).
    """

    experts: int
    experts_per_token: int
    d_expert: int
    d_shared: int = 0
    gate: RouterGate = "softmax"
    normalised: bool = False
    sum_epsilon: float = 1e-20
    gate_scale: float = 1.0
    groups: int = 1
    groups_used: int = 1
    jitter: float = 0.0
    shared_gate: bool = False
    router_bias: bool = False
    expert_bias: bool = False
    swiglu_limit: float | None = None
    expert_limit: float | None = None
    dense_limit: float | None = None
    logit_cap: float | None = None
    swiglu_alpha: float = 1.702
    activation: Activation = "swiglu"
    d_latent: int = 0
    own_norms: bool = False
    expert_scales: bool = False


def is_gated(activation: Activation) -> bool:
    """True for a feed-forward part with two matrices above, the gate and what it multiplies."""
    return activation != "relu2"
