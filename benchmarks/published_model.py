"""Writes a Mixtral-shaped model folder as Mixtral's are published, so that vLLM can be measured with its weights."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from moejax.checkpoint.checkpoint import load_params
from moejax.checkpoint.families import read_config
from moejax.config.config_values import ConfigError
from moejax.config.model_config import ModelConfig
from moejax.config.params import Layer, Params

TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
_TIE = 1e-6


def write_published(folder: Path, target: Path, form: str) -> None:
    """Write the model of `folder` as a folder of model_type mixtral with numbers of a type of TYPES. Raises ConfigError
    for a model that has more than a Mixtral, or less."""
    cfg, params = ModelConfig.load(folder), load_params(folder)
    check_mixtral(cfg, params)
    target.mkdir(parents=True)
    found = {"model.embed_tokens.weight": params.embed, "model.norm.weight": params.final_norm}
    if params.head is not None:
        found["lm_head.weight"] = params.head
    (stacked,) = params.segments[0]
    for i in range(cfg.n_layers):
        found |= {f"model.layers.{i}.{name}.weight": values for name, values in _layer(stacked, i, cfg)}
    narrow = {name: np.ascontiguousarray(values).astype(TYPES[form]) for name, values in found.items()}
    save_file(narrow, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(_config(cfg, form), indent=1))
    (target / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (target / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def check_mixtral(cfg: ModelConfig, params: Params) -> None:
    """Raise ConfigError unless a Mixtral's config.json and tensors can say all that this model is. A bias of routing
    that only breaks ties is left out."""
    if set(cfg.layer_kinds) != {"moe"}:
        raise ConfigError(f"{cfg.name} has layers of {', '.join(sorted(set(cfg.layer_kinds)))}; only 'moe' is written.")
    assert cfg.moe is not None
    found = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, router_bias=False))
    mixtral = read_config(_config(cfg, "float32"))
    names = {field.name for field in dataclasses.fields(cfg)} - {"name", "family", "weights", "d_ff"}
    other = sorted(name for name in names if getattr(found, name) != getattr(mixtral, name))
    routing = params.segments[0][0].moe
    if routing is not None and np.abs(routing.bias).max() > _TIE:
        other.append("the router's bias")
    if other:
        raise ConfigError(f"{cfg.name} is no Mixtral in {', '.join(other)}; only what its config.json says is written.")


def _layer(stacked: Layer, i: int, cfg: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """A layer's parameters by their published names."""
    N, K, H = cfg.n_heads, cfg.n_kv_heads, cfg.d_head
    q, k, v = np.split(stacked.qkv[i], np.cumsum([N * H, K * H]))
    yield from (("self_attn.q_proj", q), ("self_attn.k_proj", k), ("self_attn.v_proj", v))
    yield "self_attn.o_proj", stacked.out[i]
    yield "input_layernorm", stacked.attention_norm[i]
    yield "post_attention_layernorm", stacked.ffn_norm[i]
    assert stacked.moe is not None
    yield "block_sparse_moe.gate", stacked.moe.router[i]
    for expert, (gate_up, down) in enumerate(
        zip(stacked.moe.experts.gate_up[i], stacked.moe.experts.down[i], strict=True)
    ):
        gate, up = np.split(gate_up, 2)
        at = f"block_sparse_moe.experts.{expert}"
        yield from ((f"{at}.w1", gate), (f"{at}.w3", up), (f"{at}.w2", down))


def _config(cfg: ModelConfig, form: str) -> dict[str, object]:
    assert cfg.moe is not None
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.moe.d_expert,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.d_head,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_base,
        "num_local_experts": cfg.moe.experts,
        "num_experts_per_tok": cfg.moe.experts_per_token,
        "max_position_embeddings": cfg.max_context,
        "tie_word_embeddings": cfg.tied_head,
        "bos_token_id": cfg.bos_token,
        "eos_token_id": cfg.stop_tokens[0],
        "sliding_window": None,
        "torch_dtype": form,
    }
