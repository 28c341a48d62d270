"""One parameter as data: shape, names of its axes, initial values."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: shape, names of its logical axes, and initial standard deviation (0: ones; `BIAS_STD`: near 0)."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    std: float

    @property
    def size(self) -> int:
        """Numbers in the parameter."""
        return math.prod(self.shape)


BIAS_STD = 1e-9
"""Standard deviation of parameters that start at (nearly) zero."""
