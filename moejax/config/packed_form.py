"""The form of published weights of four bits that ranks hold as they are published."""

import dataclasses
from typing import Literal, get_args

from moejax.config.config_values import ConfigError

GROUP = 32
"""Inputs of an output that share a scale in int4 (`moejax.config.int4`)."""
ScaleType = Literal["float16", "bfloat16", "e8m0", "e4m3"]
"""Number format of scales: e8m0 are exponents of two (MXFP4), e4m3 those of NVFP4, which a factor of the tensor scales
in turn; their weights are FP4 E2M1. Those of the others are integers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedForm:
    """Matrices of four bits: `group` inputs of an output share a scale (0: all of them do), and a zero point if there
    are `zeros`. `parts` are the matrices in this form, each the names of its axes with spaces between; all others are
    bfloat16."""

    scale: ScaleType
    group: int
    zeros: bool = False
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.scale not in get_args(ScaleType):
            raise ConfigError(f"scale is {self.scale!r}; known are {', '.join(map(repr, get_args(ScaleType)))}.")
        least = GROUP // 2 if self.is_fp4 else GROUP
        if self.group % least:
            raise ConfigError(f"group is {self.group}; with scales in {self.scale} it is a multiple of {least}.")

    def __str__(self) -> str:
        numbers, zeros = "FP4" if self.is_fp4 else "integers", ", zero points" if self.zeros else ""
        many = f"{self.group} inputs" if self.group else "all inputs"
        return f"{numbers} with {self.scale} scales of {many}{zeros} ({', '.join(self.parts)})"

    @property
    def is_fp4(self) -> bool:
        """True for numbers of FP4 E2M1, False for integers."""
        return self.scale in ("e8m0", "e4m3")

    def without(self, axis: str) -> "PackedForm | None":
        """The form without the parts that have this axis; None where no part is left."""
        return self.of(tuple(part for part in self.parts if axis not in part.split()))

    def without_part(self, part: str) -> "PackedForm | None":
        """The form without a part, and without the other matrices of experts where it is one of them."""
        if "expert" in part.split():
            return self.without("expert")
        return self.of(tuple(each for each in self.parts if each != part))

    def of(self, parts: tuple[str, ...]) -> "PackedForm | None":
        """The form of these parts among its own; None where there are none."""
        parts = tuple(part for part in self.parts if part in parts)
        return dataclasses.replace(self, parts=parts) if parts else None


def part_of(axes: tuple[str, ...]) -> str:
    """The part that a parameter with these axes belongs to."""
    return " ".join(axes)
