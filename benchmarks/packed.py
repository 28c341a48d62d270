"""The inputs of a step, as the front packs them for a rank."""

import numpy as np

from serving.batch import Batch, Bucket, Work, assemble


def packed(bucket: Bucket, works: tuple[Work, ...], page_size: int, max_pages: int) -> np.ndarray:
    """A rank's part of a step of these works, int32 `[packed_size]`."""
    arrays = assemble(Batch(0, 0, bucket, {0: works}), 0, page_size=page_size, max_pages=max_pages).values()
    return np.concatenate([array.reshape(-1).view(np.int32) for array in arrays])
