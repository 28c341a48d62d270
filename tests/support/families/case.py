"""The shape of a case: a small model of a published family, as `transformers` would be asked for it."""

import dataclasses
from typing import Any

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 64,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A small model: its `model_type` in transformers, fields of its decoder's configuration beside SIZES, and what to
    change in the config.json it writes (which the reference does not see).

    `beside` is set where the decoder's configuration is a `text_config`: the other fields. `text_type` is the
    `model_type` of that `text_config`.
    """

    model_type: str
    fields: dict[str, Any]
    rewrite: dict[str, Any] = dataclasses.field(default_factory=dict)
    beside: dict[str, Any] | None = None
    text_type: str = ""

    @property
    def decoder(self) -> dict[str, Any]:
        """All fields of the decoder's configuration."""
        return SIZES | self.fields

    @property
    def family(self) -> str:
        """The `model_type` in published configurations."""
        return self.rewrite.get("model_type", self.model_type)

    def placed(self, decoder: dict[str, Any], **others: Any) -> dict[str, Any]:
        """A configuration with this decoder and `others` at the top."""
        if self.beside is None:
            return decoder | others
        return {"text_config": decoder | {"model_type": self.text_type}, **self.beside, **others}
