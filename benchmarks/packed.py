"""Packs the inputs of a step for a rank, the same way as the front."""

import numpy as np

from serving.engine.batch import Batch, ScheduledRequest, StepBucket, prepare_inputs


def packed(bucket: StepBucket, works: tuple[ScheduledRequest, ...], page_size: int, max_pages: int) -> np.ndarray:
    """The packed inputs of one rank for these works, int32 `[packed_size]`."""
    arrays = prepare_inputs(Batch(0, 0, bucket, {0: works}), 0, page_size=page_size, max_pages=max_pages).values()
    return np.concatenate([array.reshape(-1).view(np.int32) for array in arrays])
