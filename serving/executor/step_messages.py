"""A step as messages: a rank's part of it, and the rank's answer as results."""

import numpy as np

from serving.engine.batch import Batch, StepResult, collect_results, prepare_inputs, token_sources
from serving.engine.logits import MaskFunction, logits_adjustments, scored_tiles
from serving.proto.moejax.v1 import link_pb2


def step_message(
    batch: Batch,
    rank: int,
    *,
    epoch: int,
    bucket: int,
    page_size: int,
    max_pages: int,
    masks: MaskFunction,
    before: Batch | None = None,
) -> link_pb2.Step:
    """The message of a step to one rank. `bucket` is the index of its bucket, `before` the step in flight, if any."""
    message = rank_step(
        batch, rank, epoch=epoch, bucket=bucket, page_size=page_size, max_pages=max_pages, before=before
    )
    if batch.scheduled.get(rank):
        add_adjustments(message, batch, rank, masks)
    return message


def rank_step(
    batch: Batch,
    rank: int,
    *,
    epoch: int,
    bucket: int,
    page_size: int,
    max_pages: int,
    before: Batch | None = None,
) -> link_pb2.Step:
    """`step_message` without logits processing and scores."""
    message = link_pb2.Step(epoch=epoch, step=batch.step, bucket=bucket, skip_drafts=batch.skip_drafts)
    if before is not None:
        message.after = before.step
    if not batch.scheduled.get(rank):
        return message
    if before is not None:
        message.sources = token_sources(before, batch, rank).tobytes()
    arrays = prepare_inputs(batch, rank, page_size=page_size, max_pages=max_pages)
    message.inputs = b"".join(array.tobytes() for array in arrays.values())
    return message


def add_adjustments(message: link_pb2.Step | link_pb2.StepExtras, batch: Batch, rank: int, masks: MaskFunction) -> None:
    """Add to a message the changes to the logits of a rank's segments, and the tokens that it scores."""
    for segment, row in logits_adjustments(batch, rank, masks).items():
        message.adjustments.add(
            segment=segment,
            tokens=row.tokens.tobytes(),
            add=row.add.tobytes(),
            seen=row.seen.tobytes(),
            repetition=row.repetition,
            allowed=row.allowed.tobytes(),
        )
    for tile in scored_tiles(batch, rank):
        message.targets.add(row=tile.row, targets=tile.targets.tobytes())


def step_results(batch: Batch, rank: int, answer: link_pb2.StepDone) -> dict[str, StepResult]:
    """The results of a rank's answer, by request."""
    if not batch.scheduled.get(rank):
        return {}
    tokens, logprobs = np.frombuffer(answer.tokens, np.int32), np.frombuffer(answer.logprobs, np.float32)
    top = _likeliest(answer.likeliest, len(tokens)) if answer.HasField("likeliest") else None
    scores = []
    for score in answer.scores:
        given = np.frombuffer(score.logprobs, np.float32)
        scores.append((given, *_likeliest(score.likeliest, len(given))))
    drafts = np.frombuffer(answer.drafts, np.int32).reshape(len(tokens), -1) if answer.drafts else None
    return collect_results(batch, rank, tokens, logprobs, top, scores, drafts)


def _likeliest(message: link_pb2.Likeliest, rows: int) -> tuple[np.ndarray, np.ndarray]:
    tokens, logprobs = np.frombuffer(message.tokens, np.int32), np.frombuffer(message.logprobs, np.float32)
    return tokens.reshape(rows, -1), logprobs.reshape(rows, -1)
