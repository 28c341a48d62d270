"""The arguments of paged attention, one value for every implementation: reference, CPU, GPU and TPU kernels."""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Float, Int

from moejax.config.axes import ArrayLike
from moejax.config.kv_cache import KVCache


@struct.dataclass
class IndexInputs:
    """The queries of an indexer, which chooses the positions that attention sees (`moejax.model.indexer`). Its keys are
    the last numbers of the keys in the cache and among the new ones."""

    q: Float[ArrayLike, "Z Q I H"]
    weights: Float[ArrayLike, "Z Q I"]
    """How much each head counts."""
    chosen: int = struct.field(pytree_node=False)


@struct.dataclass
class AttentionInputs:
    """Queries of Z segments, Q of each, and where the keys and values that they see are.

    A query at position p sees positions 0..p of its segment's sequence, or the last `window` of them, or those since
    the last multiple of `chunk`: positions below `cached` in the pages of the cache, the others in the step's own new
    rows `new_base + position - cached` of `new`.
    """

    q: Float[ArrayLike, "Z Q N Hq"]
    new: KVCache
    """New keys and values of the step `[R, width]`, in the format of the cache."""
    cache: KVCache
    layer: Int[ArrayLike, ""]
    """Layer of the cache that is read."""
    page_table: Int[ArrayLike, "Z M"]
    """Page of the cache by segment and page of the sequence."""
    cached: Int[ArrayLike, " Z"]
    """Positions of the sequence that are in the cache."""
    new_base: Int[ArrayLike, " Z"]
    """Row of `new` that has the first position that is not."""
    positions: Int[ArrayLike, "Z Q"]
    """Position of each query; -1 for padding, whose output is zero."""
    kv_heads: int = struct.field(pytree_node=False)
    """K: heads of keys and values, which groups of N / K queries share."""
    page_size: int = struct.field(pytree_node=False)
    scale: float = struct.field(pytree_node=False)
    """Factor of the scores."""
    window: Int[ArrayLike, ""] | None = None
    chunk: Int[ArrayLike, ""] | None = None
    sinks: Float[ArrayLike, " N"] | None = None
    """A score per head that takes its share of the weight and adds nothing (arXiv 2309.17453)."""
    latent: bool = struct.field(pytree_node=False, default=False)
    """Queries meet the value followed by the key (`moejax.model.projections`): Hq = Hv + Hk, or less where an indexer's
    key follows."""
    index: IndexInputs | None = None
    d_value: int | None = struct.field(pytree_node=False, default=None)
    """Numbers of a head's value where they are not as many as a row has for each head: it may be wider than its heads
    (`ModelConfig.cache_parts`), and keys may be of another size."""

    @property
    def is_plain(self) -> bool:
        """True when there is no window, no chunk, no sink and no latent, and rows are as wide as their heads: the case
        that the kernels cover."""
        special = (self.window, self.chunk, self.sinks, self.d_value)
        return all(each is None for each in special) and not self.latent

    def last_positions(self) -> Int[ArrayLike, " Z"]:
        """The highest position of each segment's queries `[Z]`."""
        return jnp.max(self.positions, axis=1)
