"""The server's settings: frozen, validated, each default written once. Sources: TOML, environment, flags."""

import dataclasses
import difflib
import os
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from serving.errors import InvalidRequest

PREFIX = "MOEJAX_"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """One server. Ports of 0 take a free one; `slots_per_rank` None lets the planner choose."""

    model: str = "smollm2-moe"
    ranks: int = 4
    host: str = "127.0.0.1"
    grpc_port: int = 50051
    http_port: int = 8000
    chaos: bool = False
    restart: bool = True
    slots_per_rank: int | None = None
    survive: int = 1
    """Losses that must not need a new weight buffer: slots_per_rank >= ceil(experts / (ranks - survive))."""
    lattice_depth: int = 3
    """Losses of up to this many ranks are compiled, loaded and connected beforehand."""
    max_queue: int = 1024
    max_context: int | None = None
    page_size: int = 32
    pages_per_rank: int | None = None
    """None: enough for the largest decode bucket at a quarter of the context, and one full context at least."""
    buckets: tuple[tuple[int, int], ...] = ((2, 0), (8, 0), (32, 0), (8, 2), (32, 8))
    """(decode rows, prefill tiles of 32) of the compiled steps."""
    tiles_while_decoding: int = 2
    heartbeat_s: float = 0.05
    heartbeat_floor_s: float = 0.6
    step_floor_s: float = 10.0
    start_timeout_s: float = 600.0
    grace_s: float = 30.0
    """How long a drain waits for running requests."""

    def __post_init__(self) -> None:
        if not 1 <= self.ranks <= 64:
            raise InvalidRequest(f"ranks is {self.ranks}. Choose between 1 and 64 local ranks.", param="ranks")
        if not 0 <= self.survive < max(self.ranks, 1) and self.ranks > 1:
            raise InvalidRequest(
                f"survive is {self.survive} with {self.ranks} ranks. Choose between 0 and {self.ranks - 1}.",
                param="survive",
            )
        for name in ("grpc_port", "http_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise InvalidRequest(f"{name} is {getattr(self, name)}. Choose 0 to 65535.", param=name)

    @classmethod
    def load(cls, file: Path | None = None, environment: Mapping[str, str] = os.environ, **flags: Any) -> Self:
        """Settings from a TOML file, then MOEJAX_* variables, then flags that are not None; the last one wins.

        Raises InvalidRequest on an unknown key, naming the nearest, and on a value of the wrong type.
        """
        values: dict[str, Any] = {}
        if file is not None:
            values |= tomllib.loads(Path(file).read_text())
        known = {f.name for f in dataclasses.fields(cls)}
        for key, text in environment.items():
            name = key.removeprefix(PREFIX).lower()
            if key.startswith(PREFIX) and name in known:
                values[name] = text
        values |= {k: v for k, v in flags.items() if v is not None}
        hints = typing.get_type_hints(cls)
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise InvalidRequest(f"unknown setting {key!r}.{hint}", param=key)
        return cls(**{k: _read(k, v, hints[k]) for k, v in values.items()})


def _read(key: str, value: Any, hint: Any) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = kinds[0]
    try:
        if typing.get_origin(kind) is tuple:
            rows = [r.split(",") for r in value.split(";")] if isinstance(value, str) else value
            return tuple(tuple(int(n) for n in row) for row in rows)
        if kind is bool and isinstance(value, str):
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[value.lower()]
        if isinstance(value, bool) and kind is not bool:
            raise ValueError
        return kind(value)
    except (ValueError, TypeError, KeyError):
        name = getattr(kind, "__name__", kind)
        raise InvalidRequest(f"setting {key!r} is {value!r}, which is no {name}.", param=key) from None
