"""The engine that runs a step, in numbers: the shares of peak rates that it reaches, and its fixed costs."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import lru_cache
from math import inf
from pathlib import Path

from planner.errors import InputError, unknown_value
from planner.inputs.cluster import Hardware
from planner.inputs.shipped import shipped

PROFILES = shipped("configs/engines")
HERE = "jax"
"""The engine of `moejax serve`, whose constants are those of the hardware's description."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Constants of a step. Efficiencies are shares of peak; costs are seconds.

    `weights`, `cache` and `carried` (rows between the kernels of experts) are shares of memory bandwidth; `products`,
    `experts` (for 256 rows of each expert, times (rows / 256) ** `expert_slope`, at most `products`) and `context`
    (attention) shares of the 16-bit flop rate. Experts reach half of their share at an inner width of `expert_width` on
    a rank, and more where they are wider. `narrow` is the power of the ratio by which narrower numbers are faster at
    best, `links` the share of link bandwidth.

    A step costs `step`, `request` for each request of a tensor group, `kernel` for each kernel launched, and
    `collective` for each collective. A first token costs `prompt` and `prompt_kernel` for each kernel besides the
    work of its prompt. `interference` is the share of prompts beginning while a stream runs that it waits for; the
    rest of the prompts wait for each other. `mixed`: prompts are computed in the steps of running streams, so that
    weights are read once for both. `overlaps`: the exchange between hosts overlaps with the work of a second batch
    where that is faster, and links and network carry bytes at the same time.
    """

    name: str
    weights: float
    cache: float
    products: float
    experts: float
    context: float
    expert_slope: float = 0.0
    expert_width: float = 0.0
    carried: float = inf
    narrow: float = 1.0
    links: float = 1.0
    step: float = 0.0
    request: float = 0.0
    kernel: float = 0.0
    collective: float = 0.0
    prompt: float = 0.0
    prompt_kernel: float = 0.0
    interference: float = 1.0
    mixed: bool = False
    overlaps: bool = False


def engine_names() -> list[str]:
    """The names of all engines: "jax", the profiles, and their variants."""
    return [HERE, *(name for path in sorted(PROFILES.glob("*.json")) for name in (path.stem, *_read(path)["variants"]))]


def engine_of(hardware: Hardware) -> Engine:
    """The constants of the hardware's engine."""
    if hardware.engine != HERE:
        return read_profile(hardware.engine)[0]
    share = hardware.efficiency
    return Engine(
        name=HERE,
        weights=share,
        cache=share,
        products=share,
        experts=share,
        context=share,
        step=hardware.step_overhead,
        collective=hardware.collective_latency,
    )


@lru_cache
def read_profile(name: str) -> tuple[Engine, dict]:
    """The constants of an engine, and the errors measured with them (`planner.cost.band`), from its profile.

    A variant of a profile has its constants but for some. Raises InputError for a name without a profile, and for a
    profile that cannot be read.
    """
    for path in sorted(PROFILES.glob("*.json")):
        data = _read(path)
        if name == path.stem or name in data["variants"]:
            values = {key: each["value"] for key, each in data["constants"].items()}
            return Engine(name=name, **{**values, **data["variants"].get(name, {})}), data["checked"]
    raise unknown_value(name, engine_names(), "no engine with constants; engines are")


def _read(path: Path) -> dict:
    try:
        data = json.loads(path.read_text())
        known = {f.name for f in fields(Engine)}
        data["constants"] = {key: each for key, each in data["constants"].items() if key in known}
        if not isinstance(data["variants"], dict) or not isinstance(data["checked"], dict):
            raise TypeError("variants and checked must be objects")
        return data
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no profile of an engine: {type(error).__name__} {error}") from None
