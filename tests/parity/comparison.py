"""Compares two models: their log-probabilities at the same positions, and their greedy tokens."""

import dataclasses
from typing import Any

import numpy as np

PROMPT, DECODED = 41, 64
TOLERANCE = 1e-4
"""Of the largest logit: float32 over a few layers, summed in another order."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Of one model and seed: largest difference of logits over the largest logit, in prefill and in decoding, and how
    many of the greedy tokens are the same before the first that is not."""

    prefill: float
    decode: float
    tokens: int

    @property
    def holds(self) -> bool:
        """True if the two are the same model."""
        return max(self.prefill, self.decode) <= TOLERANCE and self.tokens == DECODED

    @classmethod
    def of(cls, difference_T: np.ndarray, greedy: np.ndarray, tokens: list[int]) -> "Comparison":
        """From the differences at every position (of the prompt, then of the decoded tokens but the last), and the
        greedy tokens of the reference beside ours."""
        same = greedy == tokens
        agreed = DECODED if same.all() else int(same.argmin())
        return cls(float(difference_T[:PROMPT].max()), float(difference_T[PROMPT:].max()), agreed)


def draw_prompt(seed: int, vocabulary: int) -> list[int]:
    """A prompt of its own for each seed."""
    return np.random.default_rng(seed).integers(3, vocabulary, PROMPT).tolist()


def reference_logits(model: Any, tokens: list[int]) -> np.ndarray:
    """Logits `[T, V]` of transformers at every position."""
    import torch

    torch.set_num_threads(1)  # of so small a model more would wait for each other
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
