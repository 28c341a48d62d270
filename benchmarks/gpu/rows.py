"""A measurement beside the limit that its bytes and flops set, and the table of all measurements."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

TOLERANCE = 2e-2
"""Largest error of outputs whose rows were rounded to bfloat16, against a reference with float32 rows, relative to the
largest output."""
GOALS = {"decode": 1.25, "prefill": 1 / 0.6}
"""Goals of a whole step as multiples of its limit: decoding by the bytes it moves, prefill by the matmul rate."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """The rates that the device reached in the same run: bytes a second of a copy (read and written), flops a second of
    a bfloat16 product."""

    bytes_per_s: float
    flops_per_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One figure. `bytes` and `flops` are the minimum that the work needs, `error` is against the reference (None where
    it was not compared); `alone_ms` is the time of one step that is waited for, as a server does."""

    part: str
    model: str
    case: str
    ms: float
    bytes: float
    flops: float
    error: float | None = None
    alone_ms: float | None = None
    note: str = ""

    def limit_ms(self, limits: Limits) -> float:
        """The shortest possible time: by its flops for prefill, by the slower of both for everything else."""
        multiplied = 1e3 * self.flops / limits.flops_per_s
        return multiplied if self.part == "prefill" else max(multiplied, 1e3 * self.bytes / limits.bytes_per_s)

    def beside(self, limits: Limits) -> dict[str, Any]:
        """The row with its limit, the ratio, whether the answer is right, and whether its goal, if any, is met."""
        limit = self.limit_ms(limits)
        ratio, goal = self.ms / limit, GOALS.get(self.part)
        return dataclasses.asdict(self) | {
            "limit_ms": limit,
            "ratio": ratio,
            "right": None if self.error is None else bool(self.error <= TOLERANCE),
            "met": None if goal is None else bool(ratio <= goal),
        }


def table(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The rows of `Row.beside` in Markdown."""
    heads = ("part", "model", "case", "ms", "alone, ms", "GB", "TFLOP", "limit, ms", "ratio", "error", "goal")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        met = {True: "met", False: "missed", None: "-"}[row["met"]]
        alone = "-" if row["alone_ms"] is None else f"{row['alone_ms']:.3f}"
        error = "-" if row["error"] is None else f"{row['error']:.1e}" + ("" if row["right"] else " WRONG")
        cells = (
            *(row["part"], row["model"], row["case"], f"{row['ms']:.3f}", alone),
            *(f"{row['bytes'] / 1e9:.3f}", f"{row['flops'] / 1e12:.4f}"),
            *(f"{row['limit_ms']:.3f}", f"{row['ratio']:.2f}", error, met),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def relative(ours: Any, theirs: Any) -> float:
    """The largest difference of two arrays, relative to the largest number; infinite if either has a NaN."""
    import numpy as np

    a, b = (np.asarray(each, np.float32) for each in (ours, theirs))
    found = float(np.abs(a - b).max() / max(float(np.abs(b).max()), 1e-30))
    return found if math.isfinite(found) else math.inf


def moe_work(counts: Sequence[int], rows: int, d_model: int, d_expert: int, held: int = 2) -> tuple[float, float]:
    """Bytes and flops of one layer's experts: the weights of experts to which a row is routed (`held` bytes a number),
    once; the rows read and every output written in float32. `counts` are rows by expert."""
    one = 3 * d_model * d_expert
    answers = sum(counts)
    weights = held * one * sum(count > 0 for count in counts)
    return weights + 4.0 * d_model * (rows + answers), 2.0 * one * answers


def attention_work(
    contexts: Sequence[int], new: int, heads: int, kv_heads: int, d_head: int, held: int = 4
) -> tuple[float, float]:
    """Bytes and flops of one layer's attention of `new` queries after each of these contexts of cached positions: every
    cached key and value once (`held` bytes a number), the new ones, queries and outputs once, in float32; scores and
    mixed values of every position that a query sees."""
    seen = sum(context * new + new * (new + 1) // 2 for context in contexts)
    cached = 2 * held * kv_heads * d_head * sum(contexts)
    own = 4.0 * len(contexts) * new * d_head * (2 * heads + 2 * kv_heads)
    return cached + own, 4.0 * heads * d_head * seen
