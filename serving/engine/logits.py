"""Logits processing of a step: penalties, biases and token masks by segment, and the prompt tokens to score.

Both depend only on a request and its own tokens, so they are the same on any rank and after any failure.
"""

import collections
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from planner.plan.step_layout import TILE
from serving.engine.batch import Batch, ScheduledRequest, layout
from serving.protocol.request import LogitsParams

MaskFunction = Callable[[LogitsParams], np.ndarray]
"""Returns the tokens that a request's structured output allows next, as uint32 words of bits; empty for all."""


class LogitsAdjustment(NamedTuple):
    """Changes to the logits of one segment: `add[i]` is added to the logit of `tokens[i]`; `repetition` penalizes the
    tokens in `seen`; `allowed` is a bit mask of the allowed tokens, empty for all (bit t % 32 of word t // 32 is
    token t)."""

    tokens: np.ndarray
    add: np.ndarray
    seen: np.ndarray
    repetition: float
    allowed: np.ndarray


class ScoredTile(NamedTuple):
    """A prefill tile with prompt tokens to score: its first row, and the target after each row, -1 for none `[32]`."""

    request_id: str
    row: int
    targets: np.ndarray


def logits_adjustments(batch: Batch, rank: int, masks: MaskFunction) -> dict[int, LogitsAdjustment]:
    """The logits adjustments of a rank's part of a step, by segment."""
    return {
        placed.last + nth: logits_adjustment(params, masks)
        for placed in layout(batch.bucket, batch.scheduled[rank])
        for nth, params in enumerate(_params_by_row(placed.scheduled))
    }


def _params_by_row(work: ScheduledRequest) -> Iterator[LogitsParams]:
    """The inputs of logits processing after the last token, and after each draft as if those up to it were generated,
    until none is needed. A row needs it only if the row before does: a request has no drafts in the step whose next row
    would be the first to need it (`draft_rows`)."""
    if (params := work.logits_params) is None:
        return
    for drafts in range(len(work.drafts) + 1):
        generated = (*params.generated, *work.drafts[:drafts])
        if not params.request.sampling.needs_logits_processing(len(generated)):
            return
        yield LogitsParams(params.request, generated, drafts)


def logits_adjustment(params: LogitsParams, masks: MaskFunction) -> LogitsAdjustment:
    """The logits adjustment for the next token of a request.

    Frequency and presence penalties count generated tokens, as OpenAI defines them; the repetition penalty counts
    those of the prompt too. Stop tokens are excluded until there are `min_tokens`.
    """
    request, generated = params.request, params.generated
    add = collections.defaultdict(float, request.sampling.logit_bias)
    if request.sampling.frequency_penalty or request.sampling.presence_penalty:
        for token, count in collections.Counter(generated).items():
            add[token] -= request.sampling.frequency_penalty * count + request.sampling.presence_penalty
    if len(generated) < request.sampling.min_tokens:
        add.update(dict.fromkeys(request.sampling.stop_tokens, -np.inf))
    seen = {*request.prompt, *generated} if request.sampling.repetition_penalty != 1 else set()
    nothing = np.zeros(0, np.uint32)
    return LogitsAdjustment(
        tokens=np.fromiter(add.keys(), np.int32, len(add)),
        add=np.fromiter(add.values(), np.float32, len(add)),
        seen=np.fromiter(sorted(seen), np.int32, len(seen)),
        repetition=request.sampling.repetition_penalty,
        allowed=nothing if request.sampling.structured_outputs is None else masks(params),
    )


def scored_tiles(batch: Batch, rank: int) -> Iterator[ScoredTile]:
    """The tiles to score in a rank's part of a step, in order."""
    for item, row, _ in layout(batch.bucket, batch.scheduled[rank]):
        for at in range(0, len(item.targets), TILE):
            targets = np.full(TILE, -1, np.int32)
            part = item.targets[at : at + TILE]
            targets[: len(part)] = part
            if (targets >= 0).any():
                yield ScoredTile(item.request_id, row + at, targets)
