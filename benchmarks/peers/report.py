"""Tables of what was measured: medians over rounds, and ratios pair by pair."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence

from benchmarks.peers.measure import Burst, Figures

Round = dict[str, Figures]
"""Figures by server: "moejax int8", "llama.cpp Q8_0", "vLLM bfloat16"."""


@dataclasses.dataclass(frozen=True)
class Form:
    """A form of weights in which servers are compared: moejax's data type, the peers' names, and the goals. A goal of
    rates is moejax's over the best peer's at 1, 8 and 32 requests, that of waits the largest ratio of TTFT."""

    name: str
    data_type: str
    gguf: str
    vllm: str | None
    rates: tuple[float, float, float]
    wait: float

    @property
    def peers(self) -> tuple[str, ...]:
        """Names of the servers that it is compared with."""
        return (f"llama.cpp {self.gguf}", *((f"vLLM {self.vllm}",) if self.vllm else ()))


FORMS = (
    Form("4-bit", "int4", "Q4_0", None, (1.1, 1.5, 2.0), 0.7),
    Form("8-bit", "int8", "Q8_0", None, (1.5, 2.2, 2.5), 0.5),
    Form("bfloat16", "bfloat16", "bfloat16", "bfloat16", (1.05, 1.3, 1.1), 1.0),
    Form("float32", "float32", "float32", "float32", (1.0, 1.2, 1.2), 1.0),
)
_GOAL_STREAMS = (1, 8, 32)


def servers_table(rounds: Sequence[Round]) -> list[str]:
    """Rows in Markdown: each server's medians over rounds, by number of streams."""
    streams = " / ".join(str(burst.streams) for burst in next(iter(rounds[0].values())).bursts)
    rows = [
        f"| at {streams} streams | tokens/s | TTFT, ms | gap p50, ms | gap p99, ms "
        "| prefill, tokens/s | first token, s | memory, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in rounds[0]:
        same = [each[name] for each in rounds]
        cells = [
            _bursts(same, lambda burst: burst.tokens_per_s),
            _bursts(same, lambda burst: burst.ttft_ms),
            _bursts(same, lambda burst: burst.gap_ms),
            _bursts(same, lambda burst: burst.gap_p99_ms),
            _median([figures.prefill_tokens_per_s for figures in same]),
            f"{statistics.median(figures.first_token_s for figures in same):.1f}",
            _median([figures.memory_mb for figures in same]),
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def ratios_table(rounds: Sequence[Round]) -> list[str]:
    """Rows in Markdown: moejax over the best peer of the same round, medians over rounds, and the goals."""
    rows = [
        "| form | tokens/s over the best peer | goal | TTFT over the best peer | goal | prefill |",
        "|---|---|---|---|---|---|",
    ]
    for form in FORMS:
        ours = f"moejax {form.data_type}"
        peers = [name for name in form.peers if name in rounds[0]]
        if ours not in rounds[0] or not peers:
            continue
        rates, waits = [], []
        for i in range(len(rounds[0][ours].bursts)):
            at = [(each[ours].bursts[i], [each[name].bursts[i] for name in peers]) for each in rounds]
            rates.append(statistics.median(own.tokens_per_s / max(p.tokens_per_s for p in them) for own, them in at))
            waits.append(statistics.median(own.ttft_ms / min(p.ttft_ms for p in them) for own, them in at))
        prefill = [
            own / max(them)
            for each in rounds
            if (own := each[ours].prefill_tokens_per_s) is not None
            and (them := [p for name in peers if (p := each[name].prefill_tokens_per_s) is not None])
        ]
        goals = " / ".join(f"{goal:g}" for goal in form.rates)
        cells = [
            " / ".join(f"{rate:.2f}" for rate in rates),
            f"{goals} at {' / '.join(map(str, _GOAL_STREAMS))}",
            " / ".join(f"{wait:.2f}" for wait in waits),
            f"{form.wait:g}",
            f"{statistics.median(prefill):.2f}" if prefill else "-",
        ]
        rows.append(f"| {form.name} | {' | '.join(cells)} |")
    return rows


def line_of(name: str, figures: Figures) -> str:
    """One server's figures, as they are printed when it has been measured."""
    rates, waits = _bursts([figures], lambda b: b.tokens_per_s), _bursts([figures], lambda b: b.ttft_ms)
    return (
        f"{name}: {rates} tokens/s, TTFT {waits} ms, prefill {_median([figures.prefill_tokens_per_s])} tokens/s, "
        f"first token after {figures.first_token_s} s, "
        f"{figures.memory_mb:,.0f} MB"
    )


def _bursts(same: Sequence[Figures], value: Callable[[Burst], float]) -> str:
    columns = zip(*(figures.bursts for figures in same), strict=True)
    medians = [statistics.median(value(burst) for burst in column) for column in columns]
    return " / ".join(f"{median:,.0f}" if median >= 100 else f"{median:.1f}" for median in medians)


def _median(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):,.0f}" if known else "-"
