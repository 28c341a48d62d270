"""A model that is ready to be served, as the front knows it: numbers and paths, no arrays."""

import asyncio
import dataclasses
import json
import sys
from typing import Any, Self

from planner.workload import Workload
from serving.errors import InvalidRequest, StartError
from serving.status import ModelInfo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `python -m moejax.prepare` says of a model. `weights` is the form ranks hold matrices in, and
    bytes are those of that form."""

    name: str
    config: str
    folder: str
    store: str
    executables: str
    vocab_size: int
    max_context: int
    stop_tokens: tuple[int, ...]
    bos_token: int | None
    layers: int
    moe_layers: int
    experts: int
    experts_per_token: int
    parameters: int
    expert_bytes: int
    rest_bytes: int
    cache_bytes_per_token: int
    hidden_bytes: int
    weights: str
    divided_layers: tuple[int, ...] = ()
    """Which of the MoE layers are dense ones that are divided: none of their experts can be masked."""
    content: str = ""
    """A digest of the weights."""
    steps: str = ""
    """Folder of what is counted of steps; no counts are kept without one."""
    numerics: str = ""
    """The same on hosts that compute the same numbers to the last bit."""
    heads: int = 1
    expert_flops: float = 0.0
    rest_flops: float = 0.0
    context_flops: float = 0.0

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """As `to_json` writes it."""
        values: dict[str, Any] = json.loads(text)
        for name in ("stop_tokens", "divided_layers"):
            values[name] = tuple(values[name])
        return cls(**values)

    def to_json(self) -> str:
        """For a front after this one."""
        return json.dumps(dataclasses.asdict(self))

    def workload(self, page_size: int) -> Workload:
        """The model in the planner's numbers."""
        return Workload(
            name=self.name,
            layers=self.layers,
            moe_layers=self.moe_layers,
            experts=self.experts,
            experts_per_token=self.experts_per_token,
            expert_bytes=self.expert_bytes,
            rest_bytes=self.rest_bytes,
            cache_bytes_per_token=self.cache_bytes_per_token,
            page_tokens=page_size,
            hidden_bytes=self.hidden_bytes,
            weight_format=self.weights,
            heads=self.heads,
            expert_flops=self.expert_flops,
            rest_flops=self.rest_flops,
            context_flops=self.context_flops,
        )

    def info(self) -> ModelInfo:
        """What callers may know of the model."""
        names = [field.name for field in dataclasses.fields(ModelInfo)]
        return ModelInfo(**{name: getattr(self, name) for name in names})

    def with_context(self, max_context: int | None) -> "Prepared":
        """The same model with a shorter context. Raises InvalidRequest for a longer one than it was made for."""
        if max_context is None:
            return self
        if not 2 <= max_context <= self.max_context:
            raise InvalidRequest(
                f"max_context is {max_context}; {self.name} was made for at most {self.max_context} tokens, and "
                "at least 2 are needed.",
                param="max_context",
            )
        return dataclasses.replace(self, max_context=max_context)


async def prepare(model: str, weights: str = "float32", *, in_place: bool = False, dense: str = "whole") -> Prepared:
    """Find, fetch or build a model and copy its weights into host memory, in a process of its own (it needs JAX).

    What it does is shown on this process's standard error. Raises StartError with its cause.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "moejax.prepare", model, weights),
        *(["in-place"] if in_place else ["divided"] if dense == "divided" else []),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        out, _ = await process.communicate()
    except asyncio.CancelledError:
        process.terminate()
        await process.wait()
        raise
    if process.returncode != 0:
        raise StartError(f"the model {model!r} could not be prepared; the cause stands above.")
    return Prepared.from_json(out)
