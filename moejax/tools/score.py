"""The quality of a model on a text in bits per byte, a measure that does not depend on the tokenizer."""

import math

import numpy as np
from jaxtyping import Bool
from tokenizers import Tokenizer

from moejax.config.axes import ArrayLike
from moejax.config.model_config import ModelConfig
from moejax.config.params import Params
from moejax.model.reference import losses


def bits_per_byte(
    params: Params, cfg: ModelConfig, tokenizer: Tokenizer, text: str, *, alive_LE: Bool[ArrayLike, "L E"] | None = None
) -> float:
    """Bits the model needs per byte of `text`, read in windows of the context length, each on its own.

    The tokenizer must be byte-level (each character of a token's name stands for one byte).
    """
    windows = token_windows(tokenizer, text, cfg.max_context)
    nats = sum(float(np.asarray(losses(params, cfg, w[None], alive_LE)).sum()) for w in windows)
    counted = sum(len(str(tokenizer.id_to_token(int(t)))) for w in windows for t in w[1:])
    return nats / math.log(2) / counted


def token_windows(tokenizer: Tokenizer, text: str, length: int) -> np.ndarray:
    """The tokens of a text in windows `[W, length]`; what does not fill the last is left out, if another is.

    The first token of a window is context only, as nothing stands before it.
    """
    ids = np.asarray(tokenizer.encode(text).ids, np.int32)
    if len(ids) < length:
        return ids[None]
    return ids[: len(ids) // length * length].reshape(-1, length)
