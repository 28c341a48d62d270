"""The quicker `dataclasses.replace`: what it returns is what the slower one does."""

import dataclasses
import functools

import pytest

from simulation.quick_replace import quick_replace


@dataclasses.dataclass(frozen=True)
class Plain:
    one: int
    two: tuple[int, ...] = ()

    @functools.cached_property
    def both(self) -> int:
        return self.one + sum(self.two)


@dataclasses.dataclass(frozen=True)
class Wider(Plain):
    three: int = 3


@dataclasses.dataclass(frozen=True)
class Checked:
    one: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "one", max(self.one, 0))


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    one: int


@dataclasses.dataclass
class Made:
    one: int
    twice: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.twice = 2 * self.one


@pytest.mark.parametrize("value", [Plain(1, (2,)), Wider(1), Checked(1), Slotted(1), Made(1)])
def test_it_is_as_the_one_of_the_library(value) -> None:
    for changes in ({}, {"one": 5}, {"one": -5}):
        assert quick_replace(value, **changes) == dataclasses.replace(value, **changes)
    with pytest.raises(TypeError, match="unexpected keyword argument 'none'"):
        quick_replace(value, none=1)


def test_what_was_computed_of_a_value_is_not_taken_over() -> None:
    value = Plain(1, (2,))
    assert value.both == 3
    assert quick_replace(value, one=2).both == 4
