"""The traffic of users: lengths, rates and the delays they accept."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import isfinite

from planner.errors import InputError, unknown_key


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Mean lengths in tokens, delays in milliseconds, `rps` requests per second (None: as many as fit).

    `tpot_ms` is the longest acceptable time between two tokens of a stream, `ttft_ms` until the first. `cached` is the
    mean share of a prompt that the engine's prefix cache has, and that is not computed.
    """

    prompt: int = 2048
    output: int = 512
    tpot_ms: float = 50.0
    ttft_ms: float = 5000.0
    rps: float | None = None
    cached: float = 0.0

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None and f.name == "rps":
                continue
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise InputError(f"traffic: {f.name} is {value!r}, it must be a number")
            if f.name == "cached" and not 0 <= value < 1:
                raise InputError(f"traffic: cached is {value!r}, it must be a share of at least 0 and below 1")
            if f.name != "cached" and not value > 0:
                raise InputError(f"traffic: {f.name} is {value!r}, it must be a number above 0")

    @property
    def context(self) -> float:
        """Mean tokens in the cache of a running request."""
        return self.prompt + self.output / 2

    @property
    def known(self) -> float:
        """Mean tokens of a prompt that the prefix cache has; its last token is always computed."""
        return min(self.cached * self.prompt, self.prompt - 1)

    @property
    def longest(self) -> int:
        """Tokens in the cache of a request at its end: what admission must have room for."""
        return self.prompt + self.output


def read_traffic(text: str | None) -> Traffic:
    """Traffic from `prompt=2048,output=512,tpot_ms=50,ttft_ms=5000,rps=10,cached=0.5`; what is left out is default."""
    if not text:
        return Traffic()
    return Traffic(**read_pairs(text, {f.name: float for f in fields(Traffic)}, "--traffic"))


def read_pairs(text: str, known: dict[str, type], where: str) -> dict:
    """`a=1,b=2` as a dictionary of numbers; InputError on an unknown key, one given twice, or a value that is no
    number."""
    result = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, equals, value = part.partition("=")
        if key not in known:
            raise unknown_key(key, known, where)
        if key in result:
            raise InputError(f"{where}: {key} is given twice, as {result[key]:g} and in {part!r}. Leave one out.")
        try:
            number = known[key](value)
            number = number if isfinite(number) else None
        except ValueError:
            number = None
        if not equals or number is None:
            raise InputError(f"{where}: {part!r} is not {key}=NUMBER")
        result[key] = int(number) if number == int(number) else number
    return result
