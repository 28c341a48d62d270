"""Ratios are made within a round, against the peer that is best there."""

from benchmarks.peers.measure import Burst, Figures, burst_of
from benchmarks.peers.report import ratios_table, servers_table
from benchmarks.streams import Ask, Trace


def figures(rate: float, wait: float, prefill: float | None = None) -> Figures:
    return Figures((Burst(1, rate, wait, 1.0, 2.0),), prefill, 4.0, 100.0)


def trace(sent: float, *times: float) -> Trace:
    return Trace(Ask("a", 0.0, 0, len(times)), sent, times=list(times), tokens=[-1] * len(times))


def test_a_ratio_is_over_the_best_peer_of_the_same_round():
    slow = {
        "moejax bfloat16": figures(50, 20, 300),
        "llama.cpp bfloat16": figures(100, 40, 100),
        "vLLM bfloat16": figures(25, 10, 600),
    }
    fast = {
        "moejax bfloat16": figures(300, 20, 300),
        "llama.cpp bfloat16": figures(100, 40, 100),
        "vLLM bfloat16": figures(200, 80, 50),
    }
    (row,) = ratios_table([slow, fast, fast])[2:]
    assert row == "| bfloat16 | 1.50 | 1.05 / 1.3 / 1.1 at 1 / 8 / 32 | 0.50 | 1 | 3.00 |"
    (row,) = ratios_table([slow])[2:]
    assert row.startswith("| bfloat16 | 0.50 |")
    assert " | 2.00 | 1 | 0.50 |" in row


def test_a_form_without_its_peer_has_no_ratio_and_every_server_a_row():
    rounds = [{"moejax int8": figures(50, 20)}]
    assert len(ratios_table(rounds)) == 2
    assert servers_table(rounds)[2] == "| moejax int8 | 50.0 | 20.0 | 1.0 | 2.0 | - | 4.0 | 100 |"


def test_the_rate_of_bursts_counts_no_time_between_them():
    burst = burst_of(2, [[trace(0, 1, 2), trace(0, 2, 4)], [trace(100, 101, 102), trace(101, 102, 104)]])
    assert (burst.tokens_per_s, burst.ttft_ms, burst.gap_ms, burst.gap_p99_ms) == (1.0, 1000.0, 1500.0, 2000.0)
