"""The errors of the planner: its predictions beside measured settings, also with constants that never saw their
kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from planner.cost.engine_fit import SettingArrays, constants_of, fit_engine, predict, settings_of
from planner.cost.measurements import Measurement
from planner.inputs.engine import Engine, engine_names, read_profile

KINDS = ("model", "chip", "engine")
PAIRS = "model and chip"
FULL = 64
"""The concurrency from which on tokens/s count as those of a server at full load."""


@dataclass(frozen=True, kw_only=True)
class ErrorFigures:
    """The errors of `count` predictions: `bias` is the geometric mean of predicted over measured, `factor` (geometric
    error factor) that of the larger over the smaller of both, `within_125` and `within_2` the shares within these
    factors."""

    count: int
    bias: float
    factor: float
    within_125: float
    within_2: float


def error_figures(errors: np.ndarray) -> ErrorFigures | None:
    """The figures of natural logarithms of predicted over measured; None without any."""
    if not len(errors):
        return None
    size = np.abs(errors)
    return ErrorFigures(
        count=len(errors),
        bias=float(np.exp(errors.mean())),
        factor=float(np.exp(size.mean())),
        within_125=float((size <= np.log(1.25)).mean()),
        within_2=float((size <= np.log(2)).mean()),
    )


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Predictions for measured settings. Errors are natural logarithms of predicted over measured, one for each.

    `variants` are the constants that differ by the engine that was measured (`fit_variants`).
    """

    measurements: Sequence[Measurement]
    settings: SettingArrays
    engine: Engine
    variants: Mapping[str, Mapping[str, float]]

    @cached_property
    def tpot(self) -> np.ndarray:
        """Errors of the time per output token, with the planner's constants."""
        return np.log(predict(self.settings, self.engine, self.variants).tpot / self.settings.tpot)

    @cached_property
    def ttft(self) -> np.ndarray:
        """Errors of the time to first token, with the planner's constants; nan where none was measured."""
        measured = np.where(self.settings.ttft > 0, self.settings.ttft, np.nan)
        return np.log(predict(self.settings, self.engine, self.variants).ttft / measured)

    @cached_property
    def full(self) -> np.ndarray:
        """Errors of tokens/s at a concurrency of `FULL` and more; nan elsewhere. Measured tokens/s are those of
        requests that begin again as they end."""
        s = self.settings
        measured = s.concurrency * s.output / (s.ttft + s.output * s.tpot)
        loaded = (s.concurrency >= FULL) & (s.ttft > 0)
        return np.log(predict(s, self.engine).rate / np.where(loaded, measured, np.nan))

    def labels(self, kind: str) -> np.ndarray:
        """The model, chip, engine, model and chip, or batch (concurrency, in steps of 4) of each setting, as text."""
        if kind == "batch":
            edges = 4 ** np.ceil(np.log(np.maximum(1, self.settings.concurrency)) / np.log(4)).astype(int)
            return np.array([f"up to {edge}" for edge in edges])
        if kind == PAIRS:
            return np.array([f"{m.model} on {m.chip}" for m in self.measurements])
        return np.array([getattr(m, kind) for m in self.measurements])

    def left_out(self, kind: str) -> np.ndarray:
        """Errors of the time per output token, each with constants fitted without any setting of its model (its chip,
        its engine, its pair of model and chip). nan where all settings are of one."""
        if kind not in self._left_out:
            labels, errors = self.labels(kind), np.full(len(self.measurements), np.nan)
            for label in np.unique(labels):
                inside = labels == label
                if inside.all():
                    continue
                engine = fit_engine(self.settings.only(~inside), start=self.engine)
                held = self.settings.only(inside)
                errors[inside] = np.log(predict(held, engine).tpot / held.tpot)
            self._left_out[kind] = errors
        return self._left_out[kind]

    @cached_property
    def _left_out(self) -> dict[str, np.ndarray]:
        return {}


def accuracy_of(measurements: Sequence[Measurement], name: str) -> Accuracy:
    """The predictions for `measurements` with the constants of the engine `name`, and of its variants where these are
    what was measured."""
    engine = read_profile(name)[0]
    variants = {}
    for each in {m.engine for m in measurements} & set(engine_names()):
        own = constants_of(read_profile(each)[0])
        variants[each] = {key: value for key, value in own.items() if value != getattr(engine, key)}
    return Accuracy(measurements=measurements, settings=settings_of(measurements), engine=engine, variants=variants)
