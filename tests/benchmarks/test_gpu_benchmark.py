"""`benchmarks.gpu` at sizes for a CPU: what it counts, what it calls sound, and that nothing is compiled twice."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.gpu.__main__ import PARTS, sound
from benchmarks.gpu.models import config, layers_that_fit, with_layers
from benchmarks.gpu.rows import Limits, Row, attention_work, moe_work, relative, table
from moejax.config.kv_cache import bytes_per_token
from moejax.config.model_config import ModelConfig
from moejax.config.moe_config import MoEConfig
from moejax.config.weight_formats import weight_bytes

ROOT = Path(__file__).parents[2]
MODEL = "qwen3-30b-a3b"
ROW = Row(part="decode", model="m", case="c", ms=1.2, bytes=1e6, flops=1e6)
LIMITS = Limits(bytes_per_s=1e9, flops_per_s=1e12)
"""A megabyte a millisecond, a gigaflop a millisecond."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All parts of one model, each in its process."""
    out = tmp_path_factory.mktemp("gpu") / "found.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--small", "--model", MODEL, "--json", str(out)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(out.read_text())


def rows_of(found: dict[str, Any], part: str) -> list[dict[str, Any]]:
    return [row for row in found["rows"] if row["part"] == part]


@pytest.mark.slow  # all parts at small sizes: a minute and a half of processor time
def test_every_part_ran_and_its_answers_are_those_of_the_references(found: dict[str, Any]) -> None:
    assert set(found["parts"]) == {"limits", *(f"{part} {MODEL}" for part in PARTS)}
    assert not any("error" in part for part in found["parts"].values())
    assert len(found["parts"][f"check {MODEL}"]["errors"]) == 2
    assert max(found["parts"][f"check {MODEL}"]["errors"].values()) < 1e-5
    compared = rows_of(found, "experts") + rows_of(found, "attention")
    assert len(compared) == 5
    assert all(row["right"] and 0 < row["error"] < 1e-5 for row in compared)


@pytest.mark.slow  # all parts at small sizes: a minute and a half of processor time
def test_programs_go_from_one_process_to_another_without_a_compile(found: dict[str, Any]) -> None:
    made, used = found["parts"][f"compile {MODEL}"], found["parts"][f"step {MODEL}"]
    assert made["programs"] == 1 + 3 * 3 + 1  # to connect; step, sample and commit of three buckets; to fill a slot
    assert used["compiles"] == 0
    assert used["layers"] == made["layers"]


@pytest.mark.slow  # all parts at small sizes: a minute and a half of processor time
def test_steps_count_every_flop_and_every_expert_that_is_read_once(found: dict[str, Any]) -> None:
    cfg, moe = small()
    L, D, N, K, H, V, A = *(cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.d_head), cfg.vocab_size, 2
    qkv, rest, expert = (N + 2 * K) * H * D, N * H * D + moe.experts * D, 3 * D * moe.d_expert
    for row, batch in zip(rows_of(found, "decode"), (1, 3), strict=True):
        each = qkv + rest + A * expert + 2 * N * H * 41
        assert row["flops"] == 2 * batch * (L * each + V * D)
        router, norms = 4 * moe.experts * (D + 1), 4 * (2 * D + 2 * H)
        weights = L * (2 * (qkv + N * H * D) + router + norms) + 2 * V * D + 4 * D + 2 * batch * D
        cached = 4 * batch * L * 2 * K * H * (40 + 1 + 2)
        own = 4 * batch * L * (2 * N * H + D * (1 + A))
        read, over = divmod(row["bytes"] - weights - cached - own, 2 * expert)
        assert over == 0
        assert L * A <= read <= L * min(moe.experts, batch * A)
    (prompt,) = rows_of(found, "prefill")
    attended = 2 * N * H * ((L - 1) * 64 * 65 // 2 + 64)
    assert prompt["flops"] == 2 * (64 * L * qkv + (64 * (L - 1) + 1) * (rest + A * expert) + attended + V * D)


@pytest.mark.slow  # all parts at small sizes: a minute and a half of processor time
def test_experts_count_those_that_a_row_wants(found: dict[str, Any]) -> None:
    cfg, moe = small()
    for row, rows in zip(rows_of(found, "experts"), (1, 5), strict=True):
        expert = 3 * cfg.d_model * moe.d_expert
        assert row["flops"] == 2 * expert * rows * 2
        read, over = divmod(row["bytes"] - 4 * cfg.d_model * rows * 3, 2 * expert)
        assert over == 0
        assert 2 <= read <= min(moe.experts, rows * 2)


def small() -> tuple[ModelConfig, MoEConfig]:
    cfg = config(MODEL, small=True)
    assert cfg.moe is not None
    return cfg, cfg.moe


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 9))
def test_an_expert_is_read_once_however_many_want_it(counts: list[int], times: int) -> None:
    bytes_, flops = moe_work(counts, 0, 4, 5)
    more_bytes, more_flops = moe_work([times * count for count in counts], 0, 4, 5)
    assert more_flops == times * flops
    answers = 4 * 4 * sum(counts)
    assert more_bytes - times * answers == bytes_ - answers


@given(st.lists(st.integers(0, 50), min_size=1, max_size=4), st.integers(1, 8), st.integers(0, 8))
def test_a_context_in_two_parts_is_attended_as_in_one(contexts: list[int], first: int, second: int) -> None:
    def flops(contexts: list[int], new: int) -> float:
        return attention_work(contexts, new, 4, 2, 8)[1]

    later = [context + first for context in contexts]
    assert flops(contexts, first) + flops(later, second) == flops(contexts, first + second)


def test_a_row_stands_beside_the_slower_of_its_bytes_and_flops() -> None:
    assert ROW.beside(LIMITS)["limit_ms"] == 1.0
    assert dataclasses.replace(ROW, flops=3e9).beside(LIMITS)["limit_ms"] == 3.0
    assert dataclasses.replace(ROW, part="prefill", flops=5e8).beside(LIMITS)["limit_ms"] == 0.5


@pytest.mark.parametrize(
    ("part", "ms", "flops", "met"),
    [
        ("decode", 1.25, 0.0, True),
        ("decode", 1.26, 0.0, False),
        ("prefill", 1.66, 1e9, True),
        ("prefill", 1.67, 1e9, False),
        ("experts", 9.0, 0.0, None),
    ],
)
def test_goals_are_those_of_whole_steps(part: str, ms: float, flops: float, met: bool | None) -> None:
    row = dataclasses.replace(ROW, part=part, ms=ms, flops=flops).beside(LIMITS)
    assert row["met"] is met
    assert {True: "| met |", False: "| missed |", None: "| - |"}[met] in table([row])[-1]


def test_what_is_no_number_is_wrong() -> None:
    assert relative(np.array([1.0, np.nan]), np.ones(2)) == np.inf
    row = dataclasses.replace(ROW, error=relative(np.ones(2), np.array([1.0, 0.9]))).beside(LIMITS)
    assert row["right"] is False
    assert "WRONG" in table([row])[-1]


@pytest.mark.parametrize(
    "spoilt",
    [
        {"compiles": 1},
        {"error": "ended with 1"},
        {"errors": {"batch 8": 0.5}},
        {"rows": [dataclasses.asdict(dataclasses.replace(ROW, error=0.5))]},
        {"rows": [dataclasses.asdict(dataclasses.replace(ROW, note="3 layers, NOT FINITE"))]},
    ],
)
def test_a_run_is_not_sound_where_anything_is_wrong(spoilt: dict[str, Any]) -> None:
    fine = {"compiles": 0, "errors": {"batch 8": 0.001}, "rows": [dataclasses.asdict(ROW)]}
    assert sound({"parts": {"a": fine, "b": fine}})
    assert not sound({"parts": {"a": fine, "b": fine | spoilt}})


@given(st.integers(1 << 30, 100 << 30), st.integers(0, 50_000))
def test_as_many_layers_are_taken_as_fit(room: int, entries: int) -> None:
    cfg = config(MODEL)

    def size(layers: int) -> int:
        some = with_layers(cfg, layers)
        both = weight_bytes(some, experts=True) + weight_bytes(some, experts=False)
        return both + entries * bytes_per_token(some)

    layers = layers_that_fit(cfg, room, entries)
    assert layers == 1 or size(layers) <= room
    assert layers == cfg.n_layers or size(layers + 1) > room
