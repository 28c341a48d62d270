"""The arguments of the gated delta rule and of its kin, one value for the implementations: reference and CPU kernel."""

from flax import struct
from jaxtyping import Float, Int

from moejax.config.axes import ArrayLike

EMPTY = -1
"""In the place of a state: the segment begins a sequence."""
CHAINED = -2
"""In the place of a state: the segment goes on where the one before it ends."""

PADDING = -1.0
"""In the place of a rate."""


@struct.dataclass
class DeltaInputs:
    """Rows of Z segments, and the states in which these begin: the first `decode` segments have one row each, the
    others are tiles. V value heads share K key heads evenly."""

    q: Float[ArrayLike, "R K Dk"]
    k: Float[ArrayLike, "R K Dk"]
    v: Float[ArrayLike, "R V Dv"]
    decay: Float[ArrayLike, "R V X"]
    """Factor of the state before a row is added: of a head (X is 1), or of each of its keys (X is Dk)."""
    rate: Float[ArrayLike, "R V"]
    """How much of a row is added, from 0 to 1; PADDING for rows that leave the state as it is."""
    states: Float[ArrayLike, "L states V Dk Dv"]
    layer: Int[ArrayLike, ""]
    """Layer of `states` that is read."""
    source: Int[ArrayLike, " Z"]
    """Place of each segment's state in `states`, EMPTY or CHAINED."""
    decode: int = struct.field(pytree_node=False)
    corrects: bool = struct.field(pytree_node=False, default=True)
    """True where a row adds the difference between its value and what the state has for its key: the delta rule. False
    where it adds its value (Mamba-2)."""
