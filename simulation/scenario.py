"""The scenario that a seed decides: the settings of the server, its clients, the quality of the links, and all faults
with their times.

Each kind of fault is part of a scenario or not (swarm testing: a scenario with few kinds reaches states that one with
all of them never does), and has a rate of its own.
"""

import dataclasses
import math
import random
from collections.abc import Mapping
from typing import Any, Literal

from planner.plan.shape import POOLS
from serving.config import Settings
from serving.protocol.prepared_model import PreparedModel
from simulation.hand_model import PREPARED, VOCAB

Mode = Literal["safety", "liveness"]
"""safety: faults go on to the end. liveness: they stop, and the server must serve again within a bound."""

FAULTS: Mapping[str, str] = {
    "crash": "the process of a rank ends",
    "host_crash": "all ranks of a host end",
    "hang": "a rank is stopped: neither answers nor heartbeats; for a while, or for ever",
    "slow": "a rank takes several times as long for everything, for a while",
    "starved": "the process of a rank gets no processor for a while, and its run delay grows",
    "partition": "nothing passes between the front and a rank for a while",
    "host_partition": "nothing passes between the front and the ranks of a host for a while",
    "cut": "the stream of a rank is reset, and what is on its way is lost",
    "exchange": "an exchange fails on all ranks of a mesh, and none has died",
    "nan": "some rows of a rank come out as not-a-number",
    "corrupt_nan": "the weights in a slot become not-a-number",
    "corrupt_flip": "a bit of the weights in a slot flips",
    "store": "the store of the weights cannot be read for a while",
    "disk": "the disk of the journal is full for a while",
    "front": "the front is killed, between any two turns of its event loop; another one takes over",
    "coordinator": "the coordination service is killed",
    "drain": "an operator drains a rank and has it replaced",
    "scale_down": "an operator takes a rank out",
    "scale_up": "an operator takes all ranks in again",
    "weights": "an operator brings other weights in; open streams finish on the old ones, or go on with the new ones",
    "pause": "an operator pauses the server, and lets it go on a little later",
    "device_error": "a device reports an error of some level",
    "rebalance": "an operator has experts moved by the load",
    "stuck": "the main thread of a rank obeys nothing more, and its heartbeats go on; for a while, or for ever",
    "relay": "a host agent that passes on the streams of its ranks dies, and they with it; it is started again",
    "relay_cut": "the stream of such an agent is reset, and what is on its way is lost",
}
"""Kinds of faults, and of what operators do."""
RELAY_FAULTS = ("relay", "relay_cut")
"""Kinds that only scenarios with relays have."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault. What `value` and `seconds` mean is the kind's (`simulation.injection`)."""

    at: float
    kind: str
    rank: int = 0
    seconds: float = 0.0
    value: float = 0.0

    def __str__(self) -> str:
        return f"{self.at:7.3f} s  {self.kind} rank {self.rank} for {self.seconds:.3f} s (value {self.value:.3f})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Client:
    """One client and its call: `choices` answers to one prompt. Times are seconds since the call, None for never."""

    id: str
    at: float
    prompt: tuple[int, ...]
    max_tokens: int
    seed: int
    stop_tokens: tuple[int, ...] = ()
    choices: int = 1
    timeout_s: float | None = None
    leaves: float | None = None
    """The client disconnects for good."""
    aborts: float | None = None
    """The client cancels the call by its id."""
    rereads: float | None = None
    """The client also reads the call from its beginning, over a second connection."""
    stalls: float | None = None
    """The client stops reading for as many seconds after its first token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenario:
    """All that a run depends on. `rates`: shares of messages that are late, doubled or lost, mean seconds of lateness,
    and the share of replacements that die while they start or join."""

    seed: int
    mode: Mode
    seconds: float
    """Virtual seconds for which faults happen and clients come."""
    settings: Mapping[str, Any]
    shares_memory: bool
    """Ranks exchange through memory that they share."""
    stays: bool
    """Ranks outlive their front."""
    journal: bool
    relays: bool
    """Ranks share the stream of the agent of their host (docs/decisions/0029)."""
    states: bool
    """The model has layers whose context is a state of the request."""
    restores_always: bool
    """KV entries are restored also where computing them again would be quicker."""
    rates: Mapping[str, float]
    clients: tuple[Client, ...]
    faults: tuple[Fault, ...]
    kinds: Mapping[str, float]
    """Faults a second, by kind."""

    def configuration(self) -> Settings:
        """The settings of the server."""
        return Settings(**BASE_SETTINGS, **self.settings)

    def model(self) -> PreparedModel:
        """The model that is served."""
        return dataclasses.replace(PREPARED, state_bytes=8) if self.states else PREPARED

    def lines(self) -> list[str]:
        """The configuration as text."""
        kinds = ", ".join(f"{kind} {rate:.3f}/s" for kind, rate in self.kinds.items()) or "none"
        rates = ", ".join(f"{name} {rate:.4f}" for name, rate in self.rates.items() if rate)
        return [
            f"seed {self.seed}, {self.mode}, {self.seconds:.1f} virtual seconds",
            f"settings: {', '.join(f'{name}={value}' for name, value in self.settings.items())}",
            f"ranks share memory: {self.shares_memory}; outlive their front: {self.stays}; journal: {self.journal}; "
            f"always restore: {self.restores_always}; states: {self.states}; relays: {self.relays}",
            f"links and starts: {rates or 'no faults'}",
            f"kinds of faults: {kinds}; {len(self.faults)} faults, {len(self.clients)} clients",
        ]


BASE_SETTINGS: Mapping[str, Any] = {
    "model": PREPARED.name,
    "page_size": 8,
    "max_context": PREPARED.max_context,
    "buckets": ((2, 0), (4, 0), (2, 1), (4, 2)),
    "max_queue": 64,
    "heartbeat_s": 0.2,
    "heartbeat_floor_s": 0.8,
    "step_floor_s": 1.5,
    "command_limit_s": 6.0,
    "start_timeout_s": 60.0,
    "resume_s": 600.0,
}
"""Settings that are those of every scenario."""


def draw(seed: int, mode: Mode) -> Scenario:
    """The scenario of a seed."""
    rng = random.Random(f"scenario/{mode}/{seed}")
    seconds = rng.uniform(3.0, 8.0)
    settings = _draw_settings(rng) | _draw_speculation(random.Random(f"speculation/{mode}/{seed}"))
    states = "arch" not in settings and random.Random(f"states/{mode}/{seed}").random() < 0.25
    if states:
        settings["kv_replication"] = "off"
        settings["state_snapshots"] = random.Random(f"snapshots/{mode}/{seed}").choice((None, 0, 1, 3, 9))
    elif "arch" not in settings:
        settings |= _draw_pools(random.Random(f"pools/{mode}/{seed}"), settings["ranks"])
    by_model = settings["speculate"] == "ngram" and settings.get("arch") != "disaggregated" and not states
    if by_model and random.Random(f"mtp/{mode}/{seed}").random() < 0.4:
        settings["speculate"] = "mtp"
    ranks = settings["ranks"]
    rates = {
        "late": rng.choice((0.0, 0.0, 0.002, 0.02)),
        "late_s": rng.choice((0.01, 0.1, 0.5)),
        "doubled": rng.choice((0.0, 0.0, 0.01, 0.1)),
        "lost": rng.choice((0.0, 0.0, 0.0, 0.0005)),
        "dies_joining": rng.choice((0.0, 0.0, 0.2, 0.5)),
    }
    kinds = {
        kind: math.exp(rng.uniform(math.log(0.05), math.log(0.9)))
        for kind in FAULTS
        if kind not in RELAY_FAULTS and rng.random() < 0.35
    }
    if rng.random() < 0.05:
        kinds = {}
    faults = _draw_faults(rng, kinds, seconds, ranks)
    shares_memory, stays = rng.random() < 0.6, rng.random() < 0.75
    of_relays = random.Random(f"relays/{mode}/{seed}")
    relays = stays and settings.get("arch") != POOLS and of_relays.random() < 0.4
    if relays:
        more = {kind: of_relays.uniform(0.05, 0.4) for kind in RELAY_FAULTS if of_relays.random() < 0.4}
        kinds, faults = kinds | more, faults + _draw_faults(of_relays, more, seconds, ranks)
    return Scenario(
        seed=seed,
        mode=mode,
        seconds=seconds,
        settings=settings,
        shares_memory=shares_memory,
        stays=stays,
        journal=rng.random() < 0.85,
        relays=relays,
        states=states,
        restores_always=rng.random() < 0.6,
        rates=rates,
        clients=tuple(_draw_client(rng, number, seconds) for number in range(rng.randint(3, 14))),
        faults=tuple(sorted(faults, key=lambda fault: fault.at)),
        kinds=kinds,
    )


def _draw_settings(rng: random.Random) -> dict[str, Any]:
    ranks = rng.choice((2, 3, 3, 4, 5))
    settings: dict[str, Any] = {
        "ranks": ranks,
        "hosts": rng.choice((1, 1, 2)),
        "pages_per_rank": rng.choice((16, 24, 40)),
        "lattice_depth": rng.choice((1, 1, 2)),
        "on_lost_expert": rng.choice(("wait", "mask", "auto")),
        "kv_replication": rng.choice(("memory", "stream", "off")),
        "survive": min(rng.choice((0, 1, 1, 2)), ranks - 1),
        "lookahead": rng.random() < 0.75,
        "prefix_caching": rng.random() < 0.8,
        "parity": rng.choice((0, 0, 2)) if ranks > 2 else 0,
        "scrub_s": rng.choice((0.0, 0.0, 3.0)),
        "drain_slow": rng.random() < 0.3,
        "slow_block_steps": rng.choice((3, 10, 50)),
    }
    if ranks >= 3 and rng.random() < 0.25:
        experts = rng.randint(1, ranks - 2)
        settings |= {"arch": "disaggregated", "attention": ranks - experts, "experts": experts, "hosts": 1}
    return settings


def _draw_pools(rng: random.Random, ranks: int) -> dict[str, Any]:
    if rng.random() < 0.75:
        return {}
    prefill = rng.randint(1, ranks - 1)
    pools = {"arch": POOLS, "prefill": prefill, "decode": ranks - prefill}
    return pools | {"hosts": 1, "parity": 0, "kv_replication": rng.choice(("memory", "stream"))}


def _draw_speculation(rng: random.Random) -> dict[str, Any]:
    if rng.random() < 0.4:
        return {"speculate": "off"}
    return {"speculate": "ngram", "draft_tokens": rng.choice((None, 1, 2, 5))}


def _draw_faults(rng: random.Random, kinds: Mapping[str, float], seconds: float, ranks: int) -> list[Fault]:
    """Faults of these kinds, so many a second."""
    faults: list[Fault] = []
    for kind, rate in kinds.items():
        at = rng.expovariate(rate)
        while at < seconds:
            faults.append(_draw_fault(rng, kind, at, ranks))
            at += rng.expovariate(rate)
    return faults


def _draw_fault(rng: random.Random, kind: str, at: float, ranks: int) -> Fault:
    seconds = math.exp(rng.uniform(math.log(0.02), math.log(6.0)))
    return Fault(at=at, kind=kind, rank=rng.randrange(ranks), seconds=seconds, value=rng.random())


def _draw_client(rng: random.Random, number: int, seconds: float) -> Client:
    shared = rng.choice((0, 0, 8, 16, 24))
    own = rng.randint(1, 40)
    prompt = (*range(1, shared + 1), *(rng.randrange(VOCAB) for _ in range(own)))

    def some(share: float, least: float, most: float) -> float | None:
        return rng.uniform(least, most) if rng.random() < share else None

    return Client(
        id=f"c{number}",
        at=rng.uniform(0.0, seconds),
        prompt=prompt,
        max_tokens=rng.randint(1, 96 - len(prompt)) if rng.random() < 0.3 else rng.randint(1, 24),
        seed=rng.randrange(1000),
        stop_tokens=(rng.randrange(VOCAB),) if rng.random() < 0.3 else (),
        choices=rng.choice((1, 1, 1, 2, 3)),
        timeout_s=some(0.15, 0.05, 10.0),
        leaves=some(0.1, 0.0, 5.0),
        aborts=some(0.1, 0.0, 5.0),
        rereads=some(0.2, 0.0, 3.0),
        stalls=some(0.15, 0.1, 3.0),
    )
