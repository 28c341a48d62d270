"""Predictions for many measured settings at once, and constants of an engine fitted to them.

The errors that the fit makes small are logarithms of predicted over measured seconds per output token, and, at a
concurrency of at most `ALONE`, until the first token. Large errors weigh less (a soft absolute value), and so do models
with many settings. Constants stay near `EXPECTED` in the measure of `SPREAD`; the others of an engine are not fitted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace

import numpy as np

from planner.cost.measurements import Measurement
from planner.cost.roofline import CHUNK, part_seconds
from planner.cost.step_work import StepWork, step_work
from planner.inputs.engine import Engine

ALONE = 4
EXPECTED = Engine(
    name="cuda-graph",
    weights=0.8,
    cache=0.8,
    products=0.75,
    experts=0.15,
    context=0.5,
    expert_slope=0.1,
    expert_width=300.0,
    carried=0.8,
    narrow=0.85,
    links=0.7,
    step=1e-3,
    request=1.5e-5,
    kernel=4e-6,
    collective=4e-6,
    prompt=5e-3,
    prompt_kernel=5e-5,
    interference=1.0,
    mixed=True,
    overlaps=True,
)
"""The constants before a fit. Constants outside of FITTED are assumed: large products of matrices and attention reach
these shares of peak, rows between the kernels of experts these of memory bandwidth, all-reduces these of a link. A
running stream waits for every prompt that begins while it runs, since prompts are computed in the steps of running
streams."""

SCHEDULES: Mapping[str, Mapping[str, float]] = {"sglang": {"interference": 0.5}}
"""Constants that follow from how an engine schedules prompts, where that is not in the steps of running streams. SGLang
computes prompts before it goes on with running streams, so that requests of a like length begin and end together; each
then waits for half of the others' prompts on average after its own, and for the other half before it."""

FITTED = (
    "weights",
    "cache",
    "experts",
    "expert_width",
    "step",
    "request",
    "kernel",
    "collective",
    "prompt",
    "prompt_kernel",
)
SHARES = ("weights", "cache")
MOST_BANDWIDTH = 0.95
"""The largest share of memory bandwidth that a fit may find: copies and triads reach 0.91 to 0.94 of peak on these
chips."""
SPREAD = 2.0
SOFT = 0.15
FIRST_TOKEN = 0.7
ROUNDS = 25


@dataclass(frozen=True, kw_only=True)
class SettingArrays:
    """The work and the measured seconds of many settings, each field with an entry for each setting.

    `prompts` are chunks of prompts; chunk i is of the setting `owner[i]`. `tpot` and `ttft` are measured seconds (0
    where none was measured).
    """

    decode: StepWork
    prompts: StepWork
    owner: np.ndarray
    running: np.ndarray
    groups: np.ndarray
    concurrency: np.ndarray
    output: np.ndarray
    kernels: np.ndarray
    tpot: np.ndarray
    ttft: np.ndarray
    model: np.ndarray
    engine: np.ndarray

    @property
    def alone(self) -> np.ndarray:
        """Whether a setting's first tokens are compared: bool, an entry for each."""
        return (self.concurrency <= ALONE) & (self.ttft > 0)

    def only(self, chosen: np.ndarray) -> SettingArrays:
        """The settings for which `chosen` (bool, an entry for each) holds."""
        place = np.cumsum(chosen) - 1
        kept = chosen[self.owner]
        parts = {f.name: getattr(self, f.name)[chosen] for f in fields(self)[3:]}
        return SettingArrays(
            decode=_pick(self.decode, chosen),
            prompts=_pick(self.prompts, kept),
            owner=place[self.owner[kept]],
            **parts,
        )


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """Predicted seconds of many settings: per output token, until the first token, and tokens/s of all requests."""

    tpot: np.ndarray
    ttft: np.ndarray
    rate: np.ndarray


def settings_of(measurements: Sequence[Measurement]) -> SettingArrays:
    """The work of each measurement."""
    decode, prompts, owner = [], [], []
    for i, m in enumerate(measurements):
        at = (m.workload, m.cluster, m.shape)
        shared = {"reduces_experts": True, "expert_tensor": m.expert_tensor}
        decode.append(step_work(*at, m.running, m.traffic.context, **shared))
        for done in np.arange(m.traffic.known, m.traffic.prompt, CHUNK):
            chunk = min(CHUNK, m.traffic.prompt - done)
            work = step_work(*at, chunk, done + chunk / 2, requests=1, in_prompt=True, **shared)
            prompts.append(work.added())
            owner.append(i)
    numbers = {
        "running": [m.running for m in measurements],
        "groups": [m.shape.data for m in measurements],
        "concurrency": [m.concurrency for m in measurements],
        "output": [m.traffic.output for m in measurements],
        "kernels": [m.workload.kernels for m in measurements],
        "tpot": [m.tpot for m in measurements],
        "ttft": [m.ttft for m in measurements],
    }
    return SettingArrays(
        decode=_stack(decode),
        prompts=_stack(prompts),
        owner=np.array(owner, int),
        model=np.array([m.model for m in measurements]),
        engine=np.array([m.engine for m in measurements]),
        **{name: np.array(values, float) for name, values in numbers.items()},
    )


def _stack(works: Sequence[StepWork]) -> StepWork:
    return StepWork(**{f.name: np.array([getattr(w, f.name) for w in works], float) for f in fields(StepWork)})


def _pick(work: StepWork, chosen: np.ndarray) -> StepWork:
    return StepWork(**{f.name: getattr(work, f.name)[chosen] for f in fields(StepWork)})


def predict(s: SettingArrays, engine: Engine, variants: Mapping[str, Mapping[str, float]] = SCHEDULES) -> Predicted:
    """The seconds of each setting, with the constants of `engine`; `variants` has the ones that differ, by the name
    of the engine that was measured."""

    def own(constant: str) -> np.ndarray:
        return np.array([variants.get(str(name), {}).get(constant, getattr(engine, constant)) for name in s.engine])

    launch, waited = own("prompt_kernel"), own("interference")
    step = sum(part_seconds(s.decode, engine))
    attention, experts, exchange, _ = part_seconds(s.prompts, engine)
    prefill = np.bincount(s.owner, attention + experts + exchange, len(s.running))
    begun = s.running / s.output * prefill
    return Predicted(
        tpot=step + waited * np.maximum(0.0, s.running - 1) / s.output * prefill,
        ttft=prefill * (1 + (1 - waited) * np.maximum(0.0, s.running - 1)) + step + engine.prompt + launch * s.kernels,
        rate=s.running * s.groups / (step + begun),
    )


def fit_engine(s: SettingArrays, *, start: Engine = EXPECTED) -> Engine:
    """The constants for which predictions of the settings err least, beginning at `start`.

    Gauss-Newton steps on the logarithms of the constants, halved where they do not help.
    """
    expected = np.log([getattr(EXPECTED, name) for name in FITTED])
    highest = np.array([np.log(MOST_BANDWIDTH) if name in SHARES else np.inf for name in FITTED])
    counts = Counter(s.model)
    weight = np.array([counts[m] for m in s.model], float) ** -0.25
    weight /= np.sqrt((weight**2).mean())
    x = np.log([getattr(start, name) for name in FITTED])

    def errors(x: np.ndarray) -> np.ndarray:
        p = predict(s, with_constants(x))
        first = FIRST_TOKEN * np.log(p.ttft[s.alone] / s.ttft[s.alone])
        return np.concatenate([weight * np.log(p.tpot / s.tpot), first, (x - expected) / SPREAD])

    def loss(e: np.ndarray) -> float:
        return float((np.sqrt(1 + (e / SOFT) ** 2) - 1).sum())

    e = errors(x)
    for _ in range(ROUNDS):
        slopes = np.stack([(errors(x + d) - e) / 1e-4 for d in 1e-4 * np.eye(len(x))], axis=1)
        scale = (1 + (e / SOFT) ** 2) ** -0.25
        step = np.linalg.lstsq(slopes * scale[:, None], -e * scale, rcond=None)[0]
        step = np.clip(step, -1, 1)
        before = loss(e)
        for _ in range(12):
            tried = np.minimum(x + step, highest)
            after = errors(tried)
            if loss(after) < before:
                break
            step = step / 2
        else:
            break
        x, e = tried, after
        if before - loss(e) < 1e-6 * before:
            break
    return with_constants(x)


def fit_variants(s: SettingArrays, engine: Engine) -> dict[str, dict[str, float]]:
    """The constants that differ by the engine that was measured: its `SCHEDULES`, and its `prompt_kernel` where first
    tokens at a concurrency of at most `ALONE` were measured, the value with which half of them come later than
    predicted."""
    found = {name: dict(constants) for name, constants in SCHEDULES.items()}
    without = replace(engine, prompt_kernel=0.0)
    for name in np.unique(s.engine[s.alone]):
        own = s.only(s.alone & (s.engine == name))
        rest = (own.ttft - predict(own, without).ttft) / own.kernels
        found.setdefault(str(name), {})["prompt_kernel"] = float(max(0.0, np.median(rest)))
    return found


def with_constants(x: np.ndarray) -> Engine:
    """The engine with the constants FITTED from their logarithms."""
    return replace(EXPECTED, **{name: float(np.exp(value)) for name, value in zip(FITTED, x, strict=True)})


def constants_of(engine: Engine) -> dict[str, float]:
    """The constants of an engine by name."""
    return {key: value for key, value in asdict(engine).items() if key != "name"}
