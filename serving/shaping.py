"""What bends the choice of a segment's next token besides temperature and filters, in few numbers, and what is to be
scored. Both depend on a request and its own tokens alone, so they are the same on any rank and after any failure.
"""

import collections
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from serving.batch import TILE, Batch, Shaped, segments

Masks = Callable[[Shaped], np.ndarray]
"""The tokens that a request's guide allows next, as uint32 words of bits; empty for all."""


class RowShape(NamedTuple):
    """`add[i]` for the logit of `tokens[i]`; the tokens `seen` that `repetition` makes less likely; and the bit mask
    of those `allowed`, empty for all (bit t % 32 of word t // 32 for token t)."""

    tokens: np.ndarray
    add: np.ndarray
    seen: np.ndarray
    repetition: float
    allowed: np.ndarray


class Tile(NamedTuple):
    """A prefill tile whose tokens are scored: its first row, and the target after each row, -1 for none `[32]`."""

    request_id: str
    row: int
    targets: np.ndarray


def shapes(batch: Batch, rank: int, masks: Masks) -> dict[int, RowShape]:
    """By segment, what bends the choices of a rank's part of a step."""
    return {
        placed.last: row_shape(placed.work.shaped, masks)
        for placed in segments(batch.bucket, batch.work[rank])
        if placed.work.shaped is not None
    }


def row_shape(shaped: Shaped, masks: Masks) -> RowShape:
    """What bends the next token of one request.

    Frequency and presence penalties count what was generated, as OpenAI defines them; the repetition penalty counts
    the prompt too. Stop tokens are out of reach until there are `min_tokens`.
    """
    request, generated = shaped.request, shaped.generated
    add = collections.defaultdict(float, request.logit_bias)
    if request.frequency_penalty or request.presence_penalty:
        for token, count in collections.Counter(generated).items():
            add[token] -= request.frequency_penalty * count + request.presence_penalty
    if len(generated) < request.min_tokens:
        add.update(dict.fromkeys(request.stop_tokens, -np.inf))
    seen = {*request.prompt, *generated} if request.repetition_penalty != 1 else set()
    nothing = np.zeros(0, np.uint32)
    return RowShape(
        tokens=np.fromiter(add.keys(), np.int32, len(add)),
        add=np.fromiter(add.values(), np.float32, len(add)),
        seen=np.fromiter(sorted(seen), np.int32, len(seen)),
        repetition=request.repetition_penalty,
        allowed=nothing if request.guide is None else masks(shaped),
    )


def tiles(batch: Batch, rank: int) -> Iterator[Tile]:
    """The tiles to score of a rank's part of a step, in order."""
    for item, row, _ in segments(batch.bucket, batch.work[rank]):
        for at in range(0, len(item.targets), TILE):
            targets = np.full(TILE, -1, np.int32)
            part = item.targets[at : at + TILE]
            targets[: len(part)] = part
            if (targets >= 0).any():
                yield Tile(item.request_id, row + at, targets)
