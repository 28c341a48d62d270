"""What a model is, never where it is: frozen, validated, complete before it exists."""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self


class ConfigError(ValueError):
    """A model configuration that cannot be: the message names the field, both values and the way out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The routed part of a Mixture-of-Experts layer.

    `gate` says how the k chosen router scores become weights: `softmax` over the chosen (Mixtral,
    arXiv 2401.04088) or `one` (each chosen expert counts in full: experts that are a split of a dense FFN).
    """

    experts: int
    experts_per_token: int
    d_expert: int
    d_shared: int = 0
    gate: Literal["softmax", "one"] = "softmax"

    def __post_init__(self) -> None:
        if not 1 <= self.experts_per_token <= self.experts:
            raise ConfigError(
                f"experts_per_token is {self.experts_per_token} with {self.experts} experts. "
                f"Choose between 1 and {self.experts}."
            )
        if self.gate not in ("softmax", "one"):
            raise ConfigError(f"gate is {self.gate!r}; known gates are 'softmax' and 'one'.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU; some layers with routed experts.

    `moe_every = m` makes layers m-1, 2m-1, ... Mixture-of-Experts layers and leaves the others dense;
    `moe_every = 1` makes all of them so; a model without `moe` is dense.
    """

    name: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_ff: int
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    tied_head: bool = True
    max_context: int = 2048
    bos_token: int | None = None
    stop_tokens: tuple[int, ...] = ()
    moe: MoEConfig | None = None
    moe_every: int = 1

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"{self.n_heads} query heads cannot share {self.n_kv_heads} key/value heads evenly. "
                "n_heads must be a multiple of n_kv_heads."
            )
        if self.moe is not None and not 1 <= self.moe_every <= self.n_layers:
            raise ConfigError(
                f"moe_every is {self.moe_every} in a model of {self.n_layers} layers. "
                f"Choose between 1 and {self.n_layers}."
            )

    @property
    def layer_kinds(self) -> tuple[Literal["dense", "moe"], ...]:
        """The kind of each layer, in order."""
        if self.moe is None:
            return ("dense",) * self.n_layers
        return tuple("moe" if i % self.moe_every == self.moe_every - 1 else "dense" for i in range(self.n_layers))

    @property
    def segments(self) -> tuple[tuple[tuple[str, ...], int], ...]:
        """The layers as (pattern, repeats): one scan each. 7 layers, every third routed:
        ((("dense", "dense", "moe"), 2), (("dense",), 1))."""
        if self.moe is None:
            return ((("dense",), self.n_layers),)
        pattern = ("dense",) * (self.moe_every - 1) + ("moe",)
        repeats, rest = divmod(self.n_layers, self.moe_every)
        return ((pattern, repeats),) + (((("dense",), rest),) if rest else ())

    @property
    def n_moe_layers(self) -> int:
        """Layers that have routed experts."""
        return self.layer_kinds.count("moe")

    def to_json(self) -> str:
        """The configuration as JSON; `from_json` gives it back exactly."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote. Raises ConfigError on an unknown or missing key."""
        values = json.loads(text)
        if values.get("moe") is not None:
            values["moe"] = _build(MoEConfig, values["moe"], "moe")
        values["stop_tokens"] = tuple(values.get("stop_tokens", ()))
        return _build(cls, values, "model")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `config.json` of a model folder."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ConfigError(f"{path} does not exist; a model folder holds config.json, tokenizer.json and params/.")
        return cls.from_json(path.read_text())


def _build(kind: type, values: Mapping[str, Any], where: str):
    known = {f.name: f for f in dataclasses.fields(kind)}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown key {key!r} in the {where} configuration.{hint}")
    missing = [n for n, f in known.items() if n not in values and f.default is dataclasses.MISSING]
    if missing:
        raise ConfigError(f"the {where} configuration lacks {', '.join(missing)}.")
    return kind(**values)
