"""The tables that `benchmarks.scale` computes from its measurements, and a front on simulated ranks."""

import asyncio
import json
from pathlib import Path

import pytest

from benchmarks.scale import rounded, source
from benchmarks.scale_front import FrontOf, looking
from benchmarks.scale_local import medians
from benchmarks.scale_tables import Sized, fit, front_of, report, sized
from benchmarks.simulated_ranks import SimulatedAnswers
from planner.inputs.published import read_model
from serving.proto.moejax.v1 import link_pb2
from simulation.byte_tokenizer import byte_tokenizer

ROOT = Path(__file__).parents[2]
RANKS = (4, 16, 64, 256)


def test_the_tables_in_the_text_are_those_of_the_measurements():
    data = json.loads((ROOT / "docs" / "results" / "scale.json").read_text())
    assert report(data, "deepseek-v3", "h200") in (ROOT / "docs" / "scale.md").read_text()


def test_a_fit_finds_the_factors_that_made_the_numbers():
    columns = [[1.0] * 4, RANKS, [n * n for n in RANKS]]
    seconds = [1e-3 + 2e-4 * n + 3e-7 * n * n for n in RANKS]
    assert fit(columns, seconds) == pytest.approx([1e-3, 2e-4, 3e-7])


def test_no_factor_is_below_nothing():
    assert min(fit([[1.0] * 4, RANKS], [0.5 * n - 1.5 for n in RANKS])) >= 0


def test_a_front_is_the_lines_through_its_measurements():
    steps = [{"ranks": n, "rows": r * n, "core_ms": 1 + 0.2 * n + 0.05 * r * n} for n in RANKS for r in (2, 8)]
    rounds = [
        {"ranks": n, "abort_ms": 0.1 * n, "prepare_ms": 1 + n + 0.001 * n * n, "adopt_ms": 2 + 3 * n} for n in RANKS
    ]
    front = front_of({"steps": steps, "rounds": rounds}, {"beat_ms": 0.1, "look_ms": 0.02})
    assert front.step.at(100) + front.row * 300 == pytest.approx((1 + 20 + 15) / 1e3)
    assert front.abort.at(100) == pytest.approx(0.01)
    assert front.prepare.at(1000) == pytest.approx(2.001)
    assert (front.adopt.at(10), front.beat, front.look) == pytest.approx((0.032, 1e-4, 2e-5))


def test_what_does_not_fit_says_why():
    small, enough = sized(4, "deepseek-v3", "h200"), sized(8, "deepseek-v3", "h200")
    assert isinstance(small, Sized)
    assert small.step is None
    assert "Add ranks" in small.reason
    assert enough.step is not None
    assert enough.scaled(front_of_nothing()).ahead == enough.step.total


def front_of_nothing():
    line = {"ranks": 1, "rows": 1, "core_ms": 1e-9, "abort_ms": 1e-9, "prepare_ms": 1e-9, "adopt_ms": 1e-9}
    return front_of({"steps": [line], "rounds": [line]}, {"beat_ms": 0.0, "look_ms": 0.0})


def test_medians_are_of_each_phase_over_the_losses_that_had_it():
    assert medians([{"a": 1.0}, {"a": 3.0, "b": 4.0}]) == {"a": 2.0, "b": 4.0}
    assert rounded({"a": [1.234567, 2], "b": "c"}) == {"a": [1.23457, 2], "b": "c"}


def test_a_stand_in_answers_all_but_an_abort():
    answers = SimulatedAnswers(2, 4, 3)
    assert answers.to(1, link_pb2.Command(abort=link_pb2.Abort())) is None
    done = answers.to(1, link_pb2.Command(id=7, inspect=link_pb2.Inspect()))
    assert done is not None
    assert done.done.id == 7
    step = answers.to(1, link_pb2.Command(step=link_pb2.Step(epoch=5, step=6)))
    assert step is not None
    told = step.step_done
    assert (told.epoch, told.step, len(told.tokens), len(told.expert_load)) == (5, 6, 12, 32)


def test_a_look_at_a_rank_takes_time():
    assert asyncio.run(looking(1)) > 0


@pytest.mark.parametrize("per_host", [0, 3])
def test_a_front_steps_and_survives_a_loss_on_simulated_ranks(per_host: int):
    async def play() -> None:
        async with FrontOf.simulated_ranks(3, read_model(source("tiny")), byte_tokenizer(), per_host=per_host) as front:
            step, rounds, loss = await front.step(6), await front.rounds(), await front.lose_one()
            assert step["rows"] == 6
            assert min(step["core_ms"], *rounds.values()) > 0
            assert loss["total"] >= loss["adopt"] > 0
            assert front.failover.plan_ranks == (0, 1)

    asyncio.run(play())
