"""`moejax plan accuracy DATA`: the planner's predictions beside measured settings."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from planner.cli.command import CommandResult
from planner.cli.table import table
from planner.cost.accuracy import KINDS, PAIRS, Accuracy, ErrorFigures, accuracy_of, error_figures
from planner.cost.engine_fit import ALONE
from planner.cost.measurements import read_measurements
from planner.errors import InputError

GROUPS = (*KINDS, "batch")
HEAD = ["", "settings", "bias", "factor", "in 1.25x", "in 2x"]


def accuracy(options: Namespace) -> CommandResult:
    """`accuracy DATA`."""
    measurements, left = read_measurements(options.data, configs=_configs(options.config or ()))
    if not measurements:
        raise InputError(f"{options.data} has no setting that the planner expresses; rows left out: {_reasons(left)}")
    result = accuracy_of(measurements, options.engine)
    apart = () if options.no_refit else (*KINDS, PAIRS) if options.pairs else KINDS
    data = accuracy_data(result, left, apart=apart)
    return CommandResult(data=data, text=accuracy_report(data))


def _configs(given: Sequence[str]) -> dict[str, str]:
    """The texts NAME=FILE as a mapping."""
    pairs = [each.partition("=") for each in given]
    for name, _, file in pairs:
        if not name or not file:
            raise InputError(f"--config: {name!r} is not NAME=FILE, a model_path of the table and its config.json")
    return {name: file for name, _, file in pairs}


def accuracy_data(result: Accuracy, left: Counter[str], *, apart: Sequence[str] = KINDS) -> dict:
    """The errors as data: of all settings and by kind, with the planner's constants, and with constants fitted without
    each model, chip or whatever is kept `apart`; the rows left out, by reason."""
    alone = result.settings.alone
    data: dict = {
        "settings": len(result.measurements),
        "left_out_rows": dict(left),
        "tpot": {"all": _figures(result.tpot)},
        "ttft": {"all": _figures(result.ttft[alone])},
        "tokens_per_second": {"all": _figures(result.full)},
        "refitted": {},
    }
    for kind in GROUPS:
        labels = result.labels(kind)
        names = sorted(set(labels), key=lambda name: (len(name) if kind == "batch" else 0, name))
        data["tpot"][kind] = {name: _figures(result.tpot[labels == name]) for name in names}
        data["ttft"][kind] = {name: _figures(result.ttft[(labels == name) & alone]) for name in names}
        data["tokens_per_second"][kind] = {name: _figures(result.full[labels == name]) for name in names}
    for kind in apart:
        labels = result.labels(kind)
        if len(names := sorted(set(labels))) > 1:
            errors = result.left_out(kind)
            each = {name: _figures(errors[labels == name]) for name in names}
            data["refitted"][kind] = {"all": _figures(errors), **each}
    return data


def _figures(errors: np.ndarray) -> dict | None:
    figures: ErrorFigures | None = error_figures(errors[~np.isnan(errors)])
    return asdict(figures) if figures else None


def accuracy_report(data: dict) -> str:
    """The tables of errors, at most 80 columns wide."""
    none = "" if data["left_out_rows"] else " none"
    lines = [f"{data['settings']:,} measured settings; rows left out:{none}"]
    lines += [f"  {count:>5,}  {reason}"[:80] for reason, count in Counter(data["left_out_rows"]).most_common()]
    titles = {
        "tpot": "time per output token",
        "ttft": f"time to first token, concurrency up to {ALONE}",
        "tokens_per_second": "tokens/s at full load",
    }
    for quantity, title in titles.items():
        rows = [_row("all", data[quantity]["all"])]
        for kind in GROUPS:
            rows += [_row(f"{kind} {name}", each) for name, each in data[quantity][kind].items() if each]
        lines += ["", title, table(HEAD, rows)]
    for kind, found in data["refitted"].items():
        before = f"{kind} " if kind in KINDS else ""
        rows = [_row("all" if name == "all" else f"{before}{name}", each) for name, each in found.items() if each]
        title = f"time per output token, constants fitted without the {kind}"
        lines += ["", title, table(HEAD, rows)]
    lines += ["", "bias: geometric mean of predicted over measured", "factor: of the larger over the smaller of both"]
    return "\n".join(lines)


def _row(name: str, figures: dict | None) -> list[str]:
    if figures is None:
        return [name, "0", "-", "-", "-", "-"]
    shares = (f"{figures[key]:.0%}" for key in ("within_125", "within_2"))
    return [name, f"{figures['count']:,}", f"{figures['bias']:.2f}", f"{figures['factor']:.2f}", *shares]


def _reasons(left: Counter[str]) -> str:
    return "; ".join(f"{count} {reason}" for reason, count in left.most_common(4)) or "none"
