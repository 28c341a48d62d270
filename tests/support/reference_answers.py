"""The answers of the plain reference, as far as a server that rounds its rows must answer the same."""

from pathlib import Path

import numpy as np

from moejax.checkpoint.checkpoint import load_params
from moejax.config.model_config import ModelConfig
from moejax.config.params import Params
from moejax.model.reference import greedy, logits
from moejax.tools.resolve import ensure_model
from serving.text.tokenizer import Message, Tokenizer

LENGTH = 48
"""Tokens of an answer."""
CLOSE = 0.03
"""Nats between the two likeliest tokens that rows of 16 bits may turn around."""
WIDE_CLOSE = 1e-3
"""The same of wide numbers, which are summed in another order."""


def clear_tokens(params: Params, cfg: ModelConfig, prompt: list[int], close: float = WIDE_CLOSE) -> list[int]:
    """The greedy tokens before the first whose runner-up is close; at least ten."""
    expected = greedy(params, cfg, prompt, LENGTH)
    scores = np.sort(np.asarray(logits(params, cfg, np.array([prompt + expected])))[0, len(prompt) - 1 : -1])
    clear = int(np.append(scores[:, -1] - scores[:, -2] < close, True).argmax())
    assert clear > 10
    return expected[:clear]


def folder_answer(published: Path, close: float = WIDE_CLOSE) -> tuple[list[int], list[int], Tokenizer]:
    """A conversation's tokens, the clear tokens of the answer to it, and the tokenizer, of a folder in plain form."""
    ours = ensure_model(published)
    cfg = ModelConfig.load(ours)
    tokenizer = Tokenizer.load(ours, bos_token=cfg.bos_token, stop_tokens=cfg.stop_tokens)
    prompt = list(tokenizer.chat([Message("user", "To be")]))
    return prompt, clear_tokens(load_params(ours), cfg, prompt, close), tokenizer
