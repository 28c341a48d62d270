"""The form of published weights that ranks hold as they are published."""

import dataclasses
from typing import Literal, get_args

from moejax.config.config_values import ConfigError

GROUP = 32
"""Inputs of an output that share a scale in int4 (`moejax.config.int4`)."""
NumberType = Literal["4-bit", "fp8", "int8"]
"""Of the numbers: four bits, which are FP4 E2M1 or integers as the scales say, FP8 E4M3, or integers of eight bits."""
ScaleType = Literal["float32", "float16", "bfloat16", "e8m0", "e4m3"]
"""Number format of scales: e8m0 are exponents of two. Of four bits, e8m0 (MXFP4) and e4m3 (NVFP4, which a factor of the
tensor scales in turn) are those of FP4 E2M1, the others those of integers; float32 are those of eight bits alone."""
OF_FOUR_BITS = ("float16", "bfloat16", "e8m0", "e4m3")
OF_EIGHT_BITS = ("float32", "float16", "bfloat16", "e8m0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedForm:
    """Matrices of four or eight bits: `group` inputs of an output share a scale (0: all of them do), and a zero point
    if there are `zeros`; of eight bits, `rows` outputs share them too. `parts` are the matrices in this form, each the
    names of its axes with spaces between; all others are bfloat16."""

    scale: ScaleType
    group: int
    zeros: bool = False
    parts: tuple[str, ...] = ()
    numbers: NumberType = "4-bit"
    rows: int = 1

    def __post_init__(self) -> None:
        if self.numbers not in get_args(NumberType):
            raise ConfigError(f"numbers is {self.numbers!r}; known are {', '.join(map(repr, get_args(NumberType)))}.")
        known = OF_EIGHT_BITS if self.is_eight_bit else OF_FOUR_BITS
        if self.scale not in known:
            raise ConfigError(f"scale is {self.scale!r}; known for {self.numbers} are {', '.join(map(repr, known))}.")
        least = 1 if self.is_eight_bit else GROUP // 2 if self.is_fp4 else GROUP
        if self.group % least:
            raise ConfigError(f"group is {self.group}; with scales in {self.scale} it is a multiple of {least}.")
        if self.rows < 1 or self.group < 0:
            raise ConfigError(f"rows is {self.rows} and group {self.group}; they are at least 1 and 0.")

    def __str__(self) -> str:
        numbers = {"fp8": "FP8 numbers", "int8": "integers of 8 bits"}.get(self.numbers)
        numbers, zeros = numbers or ("FP4" if self.is_fp4 else "integers"), ", zero points" if self.zeros else ""
        many = f"{self.group} inputs" if self.group else "all inputs"
        of = f"{self.rows} outputs and {many}" if self.rows > 1 else many
        return f"{numbers} with {self.scale} scales of {of}{zeros} ({', '.join(self.parts)})"

    @property
    def is_eight_bit(self) -> bool:
        """True for numbers of eight bits."""
        return self.numbers != "4-bit"

    @property
    def is_fp4(self) -> bool:
        """True for numbers of FP4 E2M1."""
        return not self.is_eight_bit and self.scale in ("e8m0", "e4m3")

    @property
    def turned(self) -> "PackedForm":
        """The form of the transposed matrix, where scales are those of blocks; the same where they are not."""
        if self.rows == 1:
            return self
        return dataclasses.replace(self, group=self.rows, rows=self.group)

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
