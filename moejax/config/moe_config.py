"""The experts of a served model, validated."""

import dataclasses
from typing import Literal, get_args

from moejax.config.config_values import ConfigError
from planner.inputs.routed_experts import Activation, RoutedExperts

Gate = Literal["softmax", "one", "share", "biased_share", "sigmoid", "sparsemixer", "input_sigmoid"]
"""The gates that are served."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig(RoutedExperts):
    """The routed part of a Mixture-of-Experts layer. A folder that does not say so has a router with a bias."""

    gate: Gate = "softmax"
    router_bias: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.experts_per_token <= self.experts:
            raise ConfigError(
                f"experts_per_token is {self.experts_per_token} with {self.experts} experts. "
                f"Choose between 1 and {self.experts}."
            )
        if self.gate not in get_args(Gate):
            raise ConfigError(f"gate is {self.gate!r}; known gates are {', '.join(map(repr, get_args(Gate)))}.")
        if self.gate == "input_sigmoid" and self.experts_per_token > 1:
            raise ConfigError(
                f"experts_per_token is {self.experts_per_token} with gate 'input_sigmoid', which scales the input of "
                "an expert: a row can be sent to one expert only."
            )
        if self.activation not in get_args(Activation):
            known = ", ".join(map(repr, get_args(Activation)))
            raise ConfigError(f"activation is {self.activation!r}; known are {known}.")
        if self.activation != "swiglu" and self.expert_bias:
            raise ConfigError(f"expert_bias is true with activation {self.activation!r}; only 'swiglu' has biases.")
        if self.activation != "swiglu" and (self.expert_limit, self.dense_limit) != (None, None):
            raise ConfigError(
                f"expert_limit is {self.expert_limit} and dense_limit {self.dense_limit} with activation "
                f"{self.activation!r}; only 'swiglu' has limits."
            )
        if self.own_norms and (not self.d_shared or self.gate == "input_sigmoid" or self.d_latent):
            raise ConfigError(
                f"own_norms is true with d_shared {self.d_shared}, gate {self.gate!r} and d_latent {self.d_latent}; it "
                "needs a shared expert, and experts that take normed rows as they are."
            )
        if self.shared_gate and not self.d_shared:
            raise ConfigError("shared_gate is true with d_shared 0: there is no shared expert to weigh.")
        if self.swiglu_limit is not None and not self.expert_bias:
            raise ConfigError(f"swiglu_limit is {self.swiglu_limit} without expert_bias; gpt-oss has both.")
        if self.expert_limit is not None and self.expert_bias:
            raise ConfigError(f"expert_limit is {self.expert_limit} with expert_bias; experts have one of the two.")
        self._check_groups()

    def _check_groups(self) -> None:
        if self.groups == 1:
            return
        if self.gate not in ("share", "biased_share", "sigmoid"):
            raise ConfigError(
                f"groups is {self.groups} with gate {self.gate!r}; only 'share', 'biased_share' and 'sigmoid' have "
                "groups."
            )
        if self.experts % self.groups or not 1 <= self.groups_used <= self.groups:
            raise ConfigError(
                f"{self.experts} experts in {self.groups} groups of which {self.groups_used} are used: "
                "groups must divide the experts, and groups_used lie between 1 and groups."
            )
        if self.groups_used * (self.experts // self.groups) < self.experts_per_token:
            raise ConfigError(
                f"experts_per_token is {self.experts_per_token}, but {self.groups_used} groups of "
                f"{self.experts // self.groups} experts hold fewer."
            )
