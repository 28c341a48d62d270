import dataclasses

import numpy as np
import pytest

from planner.cost.buckets import StepDemand
from serving.config import Settings
from serving.core.step_stats import StepStats
from serving.engine.batch import Batch, ScheduledRequest, StepBucket
from serving.proto.moejax.v1 import link_pb2
from serving.protocol.sampling import ResolvedSampling
from tests.support.fake_backend import FakeBackend

MODEL = dataclasses.replace(FakeBackend().model, moe_layers=1, experts=2)


def step_stats(**settings) -> StepStats:
    return StepStats(Settings(model="tiny", **settings), MODEL)


def work(*tokens: int) -> ScheduledRequest:
    return ScheduledRequest("a", 0, tokens, (0,), True, ResolvedSampling(max_tokens=1, seed=0))


BATCH = Batch(step=1, epoch=0, bucket=StepBucket(4, 1), scheduled={0: (work(5), work(6)), 1: (work(*range(20)),)})


def answer(own_ms: float = 1.0, compiles: int = 0, program_ms: float = 2.0) -> link_pb2.StepDone:
    load = np.array([[3, 1]], np.int32).tobytes()
    return link_pb2.StepDone(
        own_ms=own_ms, compiles=compiles, program_ms=program_ms, total_ms=program_ms + 1, expert_load=load
    )


def test_rows_and_those_that_were_filled_are_added_up():
    stats = step_stats()
    stats.record_step(BATCH, 0.0, 1.0)
    stats.record_step(BATCH, 1.0, 2.0)
    assert (stats.rows, stats.rows_filled) == (2 * 2 * (4 + 32), 2 * (1 + 1 + 20))


def test_what_steps_wanted_is_counted_until_it_is_taken():
    stats = step_stats()
    stats.record_step(BATCH, 0.0, 1.0)
    stats.record_step(BATCH, 1.0, 2.0)
    stats.record_step(Batch(step=3, epoch=0, bucket=StepBucket(4, 0), scheduled={0: (work(5),), 1: ()}), 2.0, 3.0)
    assert stats.take_demand() == {(2, 1): StepDemand(2, 4, 2 * 22), (1, 0): StepDemand(1, 2, 1)}
    assert stats.take_demand() == {}


def test_a_step_made_while_another_ran_counts_from_the_end_of_that_one():
    stats = step_stats()
    assert stats.record_step(BATCH, 10.0, 10.5) == pytest.approx(0.5)
    assert stats.record_step(BATCH, 10.2, 10.75) == pytest.approx(0.25)
    assert (stats.steps, stats.step_ms) == (2, pytest.approx(750.0))


def test_times_are_those_of_the_rank_that_spent_most():
    stats = step_stats()
    for slow, quick in ((5.0, 1.0), (6.0, 2.0)):
        stats.record_rank(0, answer(program_ms=quick))
        stats.record_rank(1, answer(program_ms=slow))
    assert (stats.program_ms, stats.rank_ms) == (11.0, 13.0)
    assert stats.last_ms == {0: 2.0, 1: 6.0}
    assert stats.expert_load.tolist() == [[12, 4]]


def test_compiles_count_from_when_a_rank_came():
    stats = step_stats()
    stats.begin_plan({0: 7, 1: 5})
    stats.record_rank(0, answer(compiles=8))
    assert stats.compiles_after_start == 1
    stats.begin_plan({0: 8})
    assert (stats.compiles, stats.compiles_after_start) == ({0: 8}, 1)
    stats.forget_rank(0)
    stats.begin_plan({0: 3, 1: 5})
    assert (stats.compiles, stats.compiles_after_start) == ({0: 3, 1: 5}, 0)


def test_paces_are_judged_once_in_a_block_and_a_new_plan_begins_another():
    stats = step_stats(slow_block_steps=2)
    stats.record_rank(0, answer(1.0))
    stats.record_rank(1, answer(4.0))
    assert stats.judge_slowness(0.0, None) == {}
    assert stats.slowness == {}
    stats.begin_plan({0: 0, 1: 0})
    stats.judge_slowness(0.0, None)
    assert stats.slowness == {}
    stats.record_rank(0, answer(1.0))
    stats.record_rank(1, answer(4.0))
    stats.judge_slowness(0.0, None)
    assert stats.slowness == {0: 0.25, 1: 4.0}
