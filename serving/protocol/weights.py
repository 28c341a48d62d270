"""A version of the served model's weights, as a value."""

import dataclasses
from typing import Literal, Self

Running = Literal["finish", "switch"]
"""The lot of open streams in a switch: they end on the old weights first, or go on with the new ones."""
RUNNING: tuple[Running, ...] = ("finish", "switch")


@dataclasses.dataclass(frozen=True)
class WeightsVersion:
    """A version of the weights. `number` grows by one with each version of a server and is what its parts compare; 0
    are the weights it was started with. `label` is the name that answers have. `model` is the folder, or name, that an
    operator gave, `store` the folder that ranks on the front's host read, `content` a digest of the weights; of number
    0 they are empty, since the prepared model has them."""

    number: int = 0
    label: str = "0"
    model: str = ""
    store: str = ""
    content: str = ""

    def to_json(self) -> dict[str, str | int]:
        """The fields by name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, str | int]) -> Self:
        """The inverse of `to_json`. Raises TypeError on other fields."""
        return cls(**value)  # pyright: ignore[reportArgumentType]


FIRST_WEIGHTS = WeightsVersion()
"""The weights that a server is started with."""
