"""A model that is ready to be served, as the front knows it: numbers and paths, no arrays."""

import asyncio
import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any, Self

from planner.inputs.workload import Workload
from serving.errors import InvalidRequest, StartError
from serving.protocol.sampling import SamplingDefaults

PREPARE = "moejax.tools.prepare"
JSON_KEYS = {"divided_layers": "sharded_layers"}
"""Fields that have another name in JSON, where fronts of 0.1.0 read them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The model being served, as callers may know it."""

    name: str
    vocab_size: int
    max_context: int
    stop_tokens: tuple[int, ...]
    bos_token: int | None
    layers: int
    moe_layers: int
    experts: int
    experts_per_token: int
    parameters: int
    has_chat_template: bool = False
    """Known to clients: the front finds out with the model's tokenizer."""
    sampling_defaults: SamplingDefaults = dataclasses.field(default_factory=SamplingDefaults)
    """Known to clients: the front reads them from the model's `generation_config.json`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedModel(ModelInfo):
    """The output of `python -m moejax.tools.prepare`: a model in host memory, with its numbers and paths. `weights` is
    the format in which ranks hold matrices, `cache_format` that of keys and values in the cache; byte counts are those
    of these formats."""

    config: str
    folder: str
    store: str
    executables: str
    expert_bytes: int
    rest_bytes: int
    cache_bytes_per_token: int
    hidden_bytes: int
    weights: str
    cache_format: str = "float32"
    original_context: int = 0
    """The longest context up to which a model with LongRoPE is served as `transformers` does, where it was made for a
    longer one; else 0."""
    state_bytes: int = 0
    """Bytes of a request's state, where the model has layers whose context is one."""
    sharded_layers: tuple[int, ...] = ()
    """MoE layers that are shards of dense layers: none of their experts can be masked."""
    content: str = ""
    """A digest of the weights."""
    unused_files: tuple[str, ...] = ()
    """Of other weights for a served model: their files that are not used because the served model's differ."""
    steps: str = ""
    """Folder of the counts of step shapes; empty: none are kept."""
    numerics: str = ""
    """Equal on hosts whose results agree to the last bit."""
    heads: int = 1
    expert_flops: float = 0.0
    rest_flops: float = 0.0
    context_flops: float = 0.0

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The inverse of `to_json`. A newer version may have fields more, which are of no use here."""
        values: dict[str, Any] = json.loads(text)
        for key, name in JSON_KEYS.items():
            values[name] = values.pop(key)
        for name in ("stop_tokens", "sharded_layers", "unused_files"):
            values[name] = tuple(values.get(name, ()))
        values.pop("sampling_defaults", None)
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def to_json(self) -> str:
        """A JSON object, read by this front and by the one after it."""
        values = dataclasses.asdict(self)
        for key, name in JSON_KEYS.items():
            values[key] = values.pop(name)
        return json.dumps(values)

    def workload(self, page_size: int) -> Workload:
        """The model in the planner's numbers."""
        names = {field.name for field in dataclasses.fields(self)} & {
            each.name for each in dataclasses.fields(Workload)
        }
        shared = {name: getattr(self, name) for name in names}
        return Workload(**shared, page_tokens=page_size, weight_format=self.weights)

    def info(self) -> ModelInfo:
        """The part that callers may know."""
        names = [field.name for field in dataclasses.fields(ModelInfo)]
        return ModelInfo(**{name: getattr(self, name) for name in names})

    def with_known_tokens(self, log: Callable[[str], None]) -> Self:
        """The same model without stop tokens and a begin token that its vocabulary lacks: they can neither be sampled
        nor computed. Logs a warning for each."""
        size, known = self.vocab_size, range(self.vocab_size)
        named = [("stop token", token) for token in self.stop_tokens]
        named += [] if self.bos_token is None else [("begin token", self.bos_token)]
        for what, token in named:
            if token not in known:
                log(
                    f"the files of {self.name} name {what} {token}, and its vocabulary has {size} tokens, 0 to "
                    f"{size - 1}: it is ignored. Correct eos_token_id or bos_token_id in config.json and "
                    "generation_config.json."
                )
        return dataclasses.replace(
            self,
            stop_tokens=tuple(token for token in self.stop_tokens if token in known),
            bos_token=self.bos_token if self.bos_token in known else None,
        )

    def with_context(self, max_context: int | None, log: Callable[[str], None]) -> "PreparedModel":
        """The same model with a shorter context; None: the longest in which it is right at every length. Raises
        InvalidRequest for a longer one than it was made for.

        A model with LongRoPE has factors for sequences up to its original context and others for longer ones. Keys in
        the cache cannot change theirs when a sequence grows, so that one set serves a whole context, which is logged.
        """
        if max_context is None and not self.original_context:
            return self
        if max_context is None:
            max_context = self.original_context
            log(
                f"{self.name} is served with a context of {max_context} tokens, within which its LongRoPE has one set "
                f"of factors. With --max-context up to {self.max_context} it serves longer texts with the factors of "
                "those, which change what it says to shorter ones."
            )
        elif max_context > self.original_context > 0:
            log(
                f"{self.name} is served with a context of {max_context} tokens, and so with LongRoPE's factors of long "
                f"texts: answers to texts up to {self.original_context} tokens differ from those of transformers."
            )
        if not 2 <= max_context <= self.max_context:
            raise InvalidRequest(
                f"max_context is {max_context}; {self.name} was made for at most {self.max_context} tokens, and "
                "at least 2 are needed.",
                param="max_context",
            )
        config = self.config
        if self.original_context:
            config = json.dumps(json.loads(config) | {"max_context": max_context})
        return dataclasses.replace(self, max_context=max_context, config=config)


def check_speculation(model: PreparedModel | Workload, speculate: str) -> None:
    """Raise InvalidRequest for drafts in a model whose layers keep a state: it cannot take a wrong draft back."""
    if model.state_bytes and speculate != "off":
        raise InvalidRequest(
            f"speculate is {speculate}, and {model.name} has layers whose context is a state, which cannot take a "
            "wrong draft back. Leave speculate out.",
            param="speculate",
        )


async def prepare_model(
    model: str,
    weights: str = "float32",
    *,
    in_place: bool = False,
    dense: str = "replicated",
    tensor: int = 1,
    kv_cache_type: str = "auto",
    mtp: bool = False,
) -> PreparedModel:
    """Find, fetch or build a model and copy its weights into host memory, in a process of its own (it needs JAX).

    A model whose heads cannot be sharded over groups of `tensor` ranks, or that lacks the layer of multi-token
    prediction that `mtp` asks for, is refused before it is converted. The process shows its progress on standard error.
    Raises StartError with its cause.
    """
    flags, how = ("--mtp",) if mtp else (), "in-place" if in_place else dense
    code, out, _ = await run_tool(PREPARE, *flags, model, weights, how, str(tensor), kv_cache_type)
    if code != 0:
        raise StartError(f"the model {model!r} could not be prepared; the lines above give the cause.")
    return PreparedModel.from_json(out)


async def prepare_weights(
    model: str,
    like: PreparedModel,
    *,
    in_place: bool = False,
    dense: str = "replicated",
    tensor: int = 1,
    mtp: bool = False,
) -> PreparedModel:
    """As `prepare_model`, for other weights of a model that is served. Raises InvalidRequest with the cause: before
    anything is converted or copied when the configurations differ, or their tokenizers."""
    given = (model, like.weights, "in-place" if in_place else dense, str(tensor), like.cache_format, like.folder)
    code, out, said = await run_tool(PREPARE, *(("--mtp",) if mtp else ()), *given, show=False)
    if code != 0:
        cause = last_line(said) or f"the process that prepares it ended with {code}"
        raise InvalidRequest(f"{model} cannot replace the weights of {like.name}: {cause}", param="model")
    return PreparedModel.from_json(out)


def last_line(said: bytes) -> str:
    """The last line of a standard error, where a tool says what failed; empty when there is none."""
    return next((line.strip() for line in reversed(said.decode(errors="replace").splitlines()) if line.strip()), "")


async def run_tool(module: str, *arguments: str, show: bool = True) -> tuple[int, bytes, bytes]:
    """Run a module of `moejax.tools` in a process of its own. Returns its code, its output and, unless it is shown, its
    standard error."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=None if show else asyncio.subprocess.PIPE,
    )
    try:
        out, said = await process.communicate()
    except asyncio.CancelledError:
        process.terminate()
        await process.wait()
        raise
    return process.returncode or 0, out, said or b""
