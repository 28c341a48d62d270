"""Fits the constants of the engine profile `cuda-graph` to a table of measured settings, and writes the profile.

    python -m benchmarks.fit_planner DATA.csv [--out configs/engines/cuda-graph.json]

DATA is a table of AIConfigurator's form (`planner.cost.measurements`). The profile has the constants with unit and
source, the constant by which its variants (the engines that were measured) differ, and for each kind of setting the
error factors that the planner prints as bands: the larger of those in the fit and of those with the kind's model left
out of it. `python -m benchmarks.accuracy DATA.csv` prints the errors.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from planner.cost.accuracy import Accuracy, error_figures
from planner.cost.engine_fit import FITTED, constants_of, fit_engine, fit_variants, settings_of
from planner.cost.measurements import read_measurements
from planner.inputs.engine import PROFILES

UNITS = {
    "weights": "share of memory bandwidth",
    "cache": "share of memory bandwidth",
    "products": "share of the flop rate",
    "experts": "share of the flop rate, at 256 rows of an expert",
    "expert_slope": "power of rows / 256",
    "expert_width": "inner width of an expert on a rank, at which it reaches half of that share",
    "carried": "share of memory bandwidth",
    "context": "share of the 16-bit flop rate",
    "narrow": "power of the ratio of flop rates",
    "links": "share of link bandwidth",
    "interference": "share of the prompts of other requests",
    "mixed": "yes or no",
    "overlaps": "yes or no",
}


def profile(path: str) -> dict:
    """The profile fitted to the table at `path`."""
    measurements, left = read_measurements(path)
    settings = settings_of(measurements)
    engine = fit_engine(settings)
    variants = fit_variants(settings, engine)
    result = Accuracy(measurements=measurements, settings=settings, engine=engine, variants=variants)
    found = {}
    for name, value in constants_of(engine).items():
        fitted = name in FITTED
        found[name] = {
            "value": float(f"{value:.4g}") if fitted else value,
            "unit": UNITS.get(name, "s"),
            "source": "fitted" if fitted else "assumed (planner.cost.engine_fit.EXPECTED)",
        }
    return {
        "generator": "python -m benchmarks.fit_planner",
        "data": f"{len(measurements):,} settings of {Path(path).name}; {sum(left.values()):,} rows left out",
        "constants": found,
        "variants": {
            name: {key: float(f"{value:.4g}") for key, value in constants.items()}
            for name, constants in variants.items()
        },
        "checked": {"limits": limits(result), "kinds": kinds(result)},
    }


def limits(result: Accuracy) -> dict:
    """The largest setting that was measured, the smallest model, and the models and formats of weights that were."""
    each = result.measurements
    return {
        "models": sorted({m.model for m in each}),
        "formats": sorted({m.workload.weight_format for m in each}),
        "bytes": min(m.workload.all_bytes for m in each),
        "devices": max(len(m.shape.roles) for m in each),
        "requests": int(np.quantile([m.running for m in each], 0.99)),
        "prompt": int(np.quantile([m.traffic.prompt for m in each], 0.99)),
    }


def kinds(result: Accuracy) -> dict[str, dict[str, float]]:
    """Error factors by chip and model, by chip, and of all."""
    chips, models = result.labels("chip"), result.labels("model")
    everything = np.ones(len(chips), bool)
    masks = {"all": everything}
    for chip in np.unique(chips):
        masks[str(chip)] = chips == chip
        for model in np.unique(models[chips == chip]):
            masks[f"{chip} {model}"] = (chips == chip) & (models == model)
    return {name: _factors(result, mask) for name, mask in masks.items()}


def _factors(result: Accuracy, mask: np.ndarray) -> dict[str, float]:
    def factor(errors: np.ndarray, fallback: np.ndarray) -> float:
        own = errors[mask & ~np.isnan(errors)]
        figures = error_figures(own if len(own) >= 5 else fallback[~np.isnan(fallback)])
        return figures.factor if figures else 1.0

    alone = np.where(result.settings.alone, result.ttft, np.nan)
    fallback = result.left_out("model")
    tpot = max(factor(result.tpot, result.tpot), factor(fallback, fallback))
    found = {"tpot": tpot, "ttft": factor(alone, alone), "rate": factor(result.full, result.full)}
    return {"count": int(mask.sum()), **{name: round(value, 3) for name, value in found.items()}}


def main() -> None:
    """Fit, and write the profile."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("data")
    arguments.add_argument("--out", type=Path, default=PROFILES / "cuda-graph.json")
    given = arguments.parse_args()
    given.out.write_text(json.dumps(profile(given.data), indent=1) + "\n")
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
