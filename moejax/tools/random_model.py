"""A model of random weights, for measuring speed: it needs no download, and its text has no meaning."""

import json
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moejax.checkpoint.checkpoint import save_model
from moejax.config.config_values import ConfigError
from moejax.config.model_config import ModelConfig
from moejax.config.params import init_params
from planner.inputs.shipped import shipped

END = "<|end|>"
TEMPLATE = shipped("configs/templates/plain.jinja")


def load_random(path: Path) -> tuple[ModelConfig, int]:
    """The configuration and the seed of a preset with the tables `[model]` and `[random]`. Raises ConfigError."""
    with path.open("rb") as file:
        tables = tomllib.load(file)
    try:
        return ModelConfig.from_json(json.dumps(tables["model"])), int(tables["random"]["seed"])
    except KeyError as error:
        raise ConfigError(f"{path} lacks the table or key {error}.") from None


def build_random(folder: Path, cfg: ModelConfig, seed: int) -> None:
    """Write the model folder: bfloat16 weights, and a tokenizer whose tokens are bytes. Raises ConfigError for a
    vocabulary that bytes do not fit in."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if cfg.vocab_size <= len(alphabet):
        raise ConfigError(f"vocab_size is {cfg.vocab_size}; bytes and an end take {len(alphabet) + 1}.")
    tokens = [END, *alphabet, *(f"<|unused {i}|>" for i in range(cfg.vocab_size - len(alphabet) - 1))]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.add_special_tokens([END])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    params = init_params(cfg, jax.random.key(seed), jnp.bfloat16)
    save_model(folder, cfg, params, tokenizer_json=tokenizer.to_str(), chat_template=TEMPLATE.read_text("utf-8"))
