import dataclasses

import numpy as np
import pytest

from planner.buckets import Want
from serving.batch import Batch, Bucket, Work
from serving.config import Settings
from serving.proto.moejax.v1 import link_pb2
from serving.tally import Tally
from tests.fake_backend import FakeBackend

MODEL = dataclasses.replace(FakeBackend().model, moe_layers=1, experts=2)


def tally(**settings) -> Tally:
    return Tally(Settings(model="tiny", **settings), MODEL)


def work(*tokens: int) -> Work:
    return Work("a", 0, tokens, (0,), True, 0.0, 0, 1.0, 0.0, 0)


BATCH = Batch(step=1, epoch=0, bucket=Bucket(4, 1), work={0: (work(5), work(6)), 1: (work(*range(20)),)})


def answer(own_ms: float = 1.0, compiles: int = 0, program_ms: float = 2.0) -> link_pb2.StepDone:
    load = np.array([[3, 1]], np.int32).tobytes()
    return link_pb2.StepDone(
        own_ms=own_ms, compiles=compiles, program_ms=program_ms, total_ms=program_ms + 1, expert_load=load
    )


def test_rows_and_those_that_were_filled_are_added_up():
    told = tally()
    told.stepped(BATCH, 0.0, 1.0)
    told.stepped(BATCH, 1.0, 2.0)
    assert (told.rows, told.rows_filled) == (2 * 2 * (4 + 32), 2 * (1 + 1 + 20))


def test_what_steps_wanted_is_counted_until_it_is_taken():
    told = tally()
    told.stepped(BATCH, 0.0, 1.0)
    told.stepped(BATCH, 1.0, 2.0)
    told.stepped(Batch(step=3, epoch=0, bucket=Bucket(4, 0), work={0: (work(5),), 1: ()}), 2.0, 3.0)
    assert told.take_wanted() == {(2, 1): Want(2, 4, 2 * 22), (1, 0): Want(1, 2, 1)}
    assert told.take_wanted() == {}


def test_a_step_made_while_another_ran_counts_from_the_end_of_that_one():
    told = tally()
    assert told.stepped(BATCH, 10.0, 10.5) == pytest.approx(0.5)
    assert told.stepped(BATCH, 10.2, 10.75) == pytest.approx(0.25)
    assert (told.steps, told.step_ms) == (2, pytest.approx(750.0))


def test_times_are_those_of_the_rank_that_spent_most():
    told = tally()
    for slow, quick in ((5.0, 1.0), (6.0, 2.0)):
        told.answered(0, answer(program_ms=quick))
        told.answered(1, answer(program_ms=slow))
    assert (told.program_ms, told.rank_ms) == (11.0, 13.0)
    assert told.last_ms == {0: 2.0, 1: 6.0}
    assert told.expert_load.tolist() == [[12, 4]]


def test_compiles_count_from_when_a_rank_came():
    told = tally()
    told.take_plan({0: 7, 1: 5})
    told.answered(0, answer(compiles=8))
    assert told.compiles_since == 1
    told.take_plan({0: 8})
    assert (told.compiles, told.compiles_since) == ({0: 8}, 1)
    told.forget(0)
    told.take_plan({0: 3, 1: 5})
    assert (told.compiles, told.compiles_since) == ({0: 3, 1: 5}, 0)


def test_paces_are_judged_once_in_a_block_and_a_new_plan_begins_another():
    told = tally(slow_block_steps=2)
    told.answered(0, answer(1.0))
    told.answered(1, answer(4.0))
    assert told.judge(0.0, None) == {}
    assert told.slowness == {}
    told.take_plan({0: 0, 1: 0})
    told.judge(0.0, None)
    assert told.slowness == {}
    told.answered(0, answer(1.0))
    told.answered(1, answer(4.0))
    told.judge(0.0, None)
    assert told.slowness == {0: 0.25, 1: 4.0}
