"""The mesh axis, the array type of annotations, and the key of shape suffixes.

Names and annotations give shapes by one letter per axis, `gates_TE = x_TD @ router_DE`:

    B batch                 T query tokens (rows)    S key/value tokens
    D model                 F feed-forward           V vocabulary
    N heads                 K key/value heads        H head size
    E logical experts       P physical slots         X experts per token
    L layers                M cache pages of a segment

    R rows of a step, or repeats of a segment's pattern (the scanned axis of parameters)
    Z segments of a step, Q queries of a segment    I heads of an indexer
    A answers that a token can get from one rank     n ranks     r rows that reached a rank
    G groups (of experts, of query heads)            W words of a bit mask
"""

from typing import TYPE_CHECKING

import jax
import numpy as np

RANKS = "ranks"
"""The only mesh axis, one device per rank: attention is data-parallel over it, experts are spread over it."""

if TYPE_CHECKING:
    ArrayLike = jax.Array
else:
    ArrayLike = jax.Array | np.ndarray
"""The array type of shape annotations. At run time, where annotations are checked in tests, a NumPy array will do."""

MASKED_SCORE = -1e30
"""Score of a key that a query must not see: so low that its weight is exactly 0, finite so that it can be
subtracted."""
