"""The report of `moejax plan verify`: predictions beside the figures of the compiler and beside measurements."""

from __future__ import annotations

from dataclasses import asdict

from planner.cli.table import table, terminal_width
from planner.cost.band import Band
from planner.cost.calibration import Calibration


def verify_report(compiled: dict, calibration: Calibration | None, estimate: float, band: Band) -> tuple[dict, str]:
    """Both comparisons as data and as text; `estimate` is the predicted step in seconds, with its `band`."""
    data: dict = {"estimate_step_s": estimate, "aot": compiled, "measured": []}
    data |= {"band": band.to_dict(), "ranges": {"step_s": band.around(estimate, "tpot")}}
    lines = [f"step by roofline, as many requests as fit: {estimate * 1e3:.2f} ms   [estimate]"]
    lines.append(f"  {band.text(estimate * 1e3, 'tpot', 'ms')}  {band.source()}")
    if compiled:
        lines += _aot_lines(compiled)
    if calibration is not None:
        data["measured"] = [{**asdict(r), "error": r.error} for r in calibration.rows]
        data["hardware"] = asdict(calibration.cluster.hardware)
        for r in calibration.rows:
            lines.append(
                f"concurrency {r.concurrency:>3}: measured {r.measured * 1e3:8.2f} ms, as described "
                f"{r.described * 1e3:8.2f} ms, fitted to the others {r.fitted * 1e3:8.2f} ms ({r.error:+.0%})"
            )
    return data, "\n".join(lines)


def _aot_lines(compiled: dict) -> list[str]:
    """A table of the meshes compiled, notes on it, and the meshes that could not be compiled."""
    head = ["mesh", "devices", "slots", "memory", "planned", "compiled in", "step ms", "attention", "experts", "rest"]
    rows, failed = [], []
    for row in compiled["meshes"]:
        if row.get("error"):
            failed.append(f"{row['name']} ({row['devices']} devices) does not compile: {row['error']}")
            continue
        planned = row["planned_s"]
        seconds = dict(row["seconds"])
        total, parts = sum(seconds.values()), [seconds.pop("attention", 0.0), seconds.pop("experts", 0.0)]
        parts.append(sum(seconds.values()))
        mine = [planned["attention"] + planned["experts"], planned["attention"], planned["experts"], 0.0]
        both = [f"{_ms(a) if total else '-'} ({_ms(b)})" for a, b in zip([total, *parts], mine, strict=True)]
        memory = [f"{row['device_bytes'] / 1e9:.2f} GB", f"{row['planned_bytes'] / 1e9:.2f} GB"]
        rows.append([row["name"], row["devices"], row["slots"], *memory, f"{row['compile_s']:.1f} s", *both])
    lines = [f"{compiled['topology']}: {compiled['notes'][0]}", *compiled["notes"][1:]]
    if rows:
        lines += [
            "",
            table(head, rows, width=terminal_width()),
            "",
            "[aot] the compiler's milliseconds, in brackets the planner's [estimate]",
        ]
        lines += _exchange_line(compiled["meshes"]) + _kernel_line(compiled["meshes"])
    return lines + failed


def _exchange_line(rows: list[dict]) -> list[str]:
    """A line on the exchanges, for which the compiler gives no seconds."""
    whole = next(row for row in rows if not row.get("error"))
    if not whole["exchanges"]:
        return []
    planned = whole["planned_s"]["exchange"]
    return [
        f"the compiler prices no exchange: {whole['exchanges']:.0f} of them, {whole['exchange_bytes'] / 1e6:,.1f} MB a "
        f"device in all; {_ms(planned)} ms by the planner [estimate]"
    ]


def _kernel_line(rows: list[dict]) -> list[str]:
    """A line on Pallas kernels, for which the compiler gives no seconds."""
    kernels = next(row for row in rows if not row.get("error"))["kernels"]
    if not kernels:
        return []
    counts = ", ".join(f"{count:.0f} in {part}" for part, count in kernels.items())
    return [f"nor kernels in Pallas ({counts}): its milliseconds are of what is around them"]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"
