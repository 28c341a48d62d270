"""New weights as changed tensors, as values, and the process that makes a folder of them (it needs JAX)."""

import dataclasses
import json
from pathlib import Path

from serving.errors import InvalidRequest, NoCapacity
from serving.protocol.instructions import Instruction
from serving.protocol.prepared_model import PreparedModel, last_line, run_tool
from serving.protocol.weights import Running

DATA, TENSORS = "data", "tensors.json"
"""Files in a folder of changed tensors: their bytes, and format, shape and first byte of each by name."""


@dataclasses.dataclass(frozen=True)
class TensorType:
    """The number format of a tensor, as NumPy and ml_dtypes name it, its shape, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorUpdate:
    """An update of the weights by changed tensors. `version`, `running` and `timeout_s` are as in an `Instruction` for
    weights; `base_version` is the label of the weights that are changed, which must be in force (empty: whichever
    are). Raises InvalidRequest as `Instruction` does."""

    version: str = ""
    base_version: str = ""
    running: Running = "switch"
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        self.instruction("changed tensors")

    def instruction(self, model: str) -> Instruction:
        """The instruction that brings the folder `model` in, which has the changed tensors."""
        return Instruction(
            action="weights", model=model, version=self.version, running=self.running, timeout_s=self.timeout_s
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorTarget:
    """The weights that changed tensors are for: their label, and the tensors that they have by name. What a process of
    this machine receives goes to a folder of its own in `folder`."""

    folder: str
    base_version: str
    tensors: dict[str, TensorType]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseWeights:
    """Weights in force: the folder or name that they were read from, the digest of their `content`, and how the model
    is `served` (the arguments of `prepare_model`)."""

    model: str
    content: str
    served: PreparedModel
    how: str
    mtp: bool

    @property
    def _arguments(self) -> tuple[str, ...]:
        flags = ("--mtp",) if self.mtp else ()
        return (*flags, self.model, self.served.weights, self.how, self.content)

    async def tensors(self) -> dict[str, TensorType]:
        """The tensors of the folder. Raises InvalidRequest when it has changed since, or cannot be read."""
        out = await self._run()
        return {name: TensorType(dtype, tuple(shape), size) for name, (dtype, shape, size) in json.loads(out).items()}

    async def change(self, changes: Path, target: Path) -> None:
        """Make the folder `target` of the folder of these weights and the tensors in `changes`. Raises InvalidRequest
        as `tensors` does, and NoCapacity when it cannot be written."""
        await self._run(str(changes), str(target))

    async def _run(self, *places: str) -> bytes:
        code, out, said = await run_tool("moejax.tools.changed_tensors", *self._arguments, *places, show=False)
        if code != 0:
            cause = last_line(said) or f"the process that changes them ended with {code}"
            if cause.startswith("OSError"):
                raise NoCapacity(f"the changed tensors cannot be written: {cause}")
            raise InvalidRequest(f"tensors of {self.served.name} cannot be changed: {cause}", param="base_version")
        return out
