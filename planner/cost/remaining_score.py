"""The loss of quality while experts are masked."""

from __future__ import annotations

import numpy as np

# Share of experts masked against the average score of ten tasks, worst-case choice of experts
# (ReviveMoE, arXiv 2602.21140); the generation task GSM8k falls faster: 0.641, 0.540 at 1/8, 0.318 at 1/4.
SCORES = (
    (0.0, 0.683),
    (1 / 64, 0.681),
    (1 / 32, 0.681),
    (1 / 16, 0.675),
    (1 / 8, 0.663),
    (1 / 4, 0.625),
    (1 / 2, 0.542),
)


def remaining_score(share: float) -> float:
    """The share of the average task score left when `share` of the experts is masked (SCORES, linear in between)."""
    x, y = zip(*SCORES, strict=True)
    return float(np.interp(share, x, y) / SCORES[0][1])
