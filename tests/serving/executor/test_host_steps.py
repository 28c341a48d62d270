"""A step that is sent once for a host is the one that each of its ranks would get on a stream of its own."""

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.batch import PLACEHOLDER_TOKEN, Batch, ScheduledRequest, StepBucket
from serving.engine.snapshots import SnapshotWrite
from serving.executor.host_steps import (
    HostAnswer,
    host_results,
    host_step,
    host_step_done,
    read_host_step,
    steps_of_ranks,
)
from serving.executor.step_messages import step_message, step_results
from serving.proto.moejax.v1 import link_pb2
from serving.protocol.sampling import ResolvedSampling
from simulation.hand_model import small_limits

LIMITS = dataclasses.replace(small_limits(), page_size=8, max_context=160)
BUCKET = StepBucket(4, 2)
LINKS = {3: 7, 5: 8, 6: 9}
"""Ranks of the host, and the numbers of their streams."""
MESSAGE = {"epoch": 4, "bucket": 1}


@st.composite
def scheduled(draw: st.DrawFn, name: str, *, tiles: bool, states: bool) -> ScheduledRequest:
    start, count = draw(st.integers(0, 60)), draw(st.integers(2, 32)) if tiles else 1
    drafts = () if tiles or states else tuple(draw(st.lists(st.integers(0, 99), max_size=1)))
    sampling = ResolvedSampling(
        max_tokens=9,
        seed=draw(st.integers(0, 2**64 - 1)),
        temperature=draw(st.floats(0, 2)),
        top_k=draw(st.integers(0, 99)),
        top_p=draw(st.floats(0.01, 1)),
        min_p=draw(st.floats(0, 1)),
        prompt_logprobs=0,
    )
    return ScheduledRequest(
        name,
        start,
        tuple(draw(st.lists(st.integers(0, 99), min_size=count, max_size=count))),
        tuple(draw(st.permutations(range(20)))[:13]),
        draw(st.booleans()) or bool(drafts),
        sampling,
        targets=tuple(draw(st.lists(st.integers(-1, 99), min_size=count, max_size=count)))
        if draw(st.booleans())
        else (),
        drafts=drafts,
        states=(draw(st.integers(0, 20)), draw(st.integers(0, 20))) if states else None,
        snapshots=(SnapshotWrite(start + count, draw(st.integers(30, 40))),) if states and draw(st.booleans()) else (),
    )


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    parts, states = {}, draw(st.booleans())
    for rank in LINKS:
        rows = [draw(scheduled(f"{rank}-{i}", tiles=False, states=states)) for i in range(draw(st.integers(0, 2)))]
        tiles = [draw(scheduled(f"{rank}-t{i}", tiles=True, states=states)) for i in range(draw(st.integers(0, 2)))]
        parts[rank] = (*rows, *tiles)
    return Batch(step=6, epoch=4, bucket=BUCKET, scheduled=parts)


def after(batch: Batch) -> Batch:
    """The next step, of the same requests: a request that samples has a token that is not known yet."""
    parts = {
        rank: tuple(
            dataclasses.replace(
                item,
                start=item.start + len(item.tokens),
                tokens=(PLACEHOLDER_TOKEN if item.samples else 5,),
                drafts=(),
                targets=(),
                snapshots=(),
            )
            for item in work
        )
        for rank, work in batch.scheduled.items()
    }
    return dataclasses.replace(batch, step=7, scheduled=parts)


def sent(batch: Batch, before: Batch | None) -> link_pb2.HostStep:
    message = host_step(
        batch, LINKS, limits=LIMITS, masks=lambda params: np.zeros(0, np.uint32), before=before, **MESSAGE
    )
    return link_pb2.HostStep.FromString(message.SerializeToString())


@settings(deadline=None, max_examples=25)
@given(batches())
def test_every_rank_gets_the_message_that_it_would_get_on_a_stream_of_its_own(batch: Batch) -> None:
    links, known = list(LINKS.values()), None
    for each, before in ((batch, None), (after(batch), batch)):
        message = sent(each, before)
        read = read_host_step(message, links)
        for rank, step in zip(LINKS, steps_of_ranks(message, read, links, known), strict=True):
            assert step == step_message(
                each,
                rank,
                page_size=LIMITS.page_size,
                max_pages=LIMITS.max_pages,
                masks=lambda params: np.zeros(0, np.uint32),
                before=before,
                **MESSAGE,
            )
        known = read


@settings(deadline=None, max_examples=25)
@given(batches(), st.data())
def test_the_results_of_a_host_are_those_of_its_ranks(batch: Batch, data: st.DataObject) -> None:
    message = sent(batch, None)
    read = read_host_step(message, list(LINKS.values()))
    answers, expected = {}, {}
    for rank, link in LINKS.items():
        tokens = np.array(data.draw(st.lists(st.integers(-1, 99), min_size=6, max_size=6)), np.int32)
        done = link_pb2.StepDone(step=6, epoch=4, tokens=tokens.tobytes(), own_ms=rank, compiles=rank)
        done.logprobs = (-tokens / 7).astype(np.float32).tobytes()
        for item in batch.scheduled[rank]:
            if any(target >= 0 for target in item.targets):
                top = np.zeros((32, 2), np.float32).tobytes()
                likeliest = link_pb2.Likeliest(tokens=top, logprobs=top)
                done.scores.add(logprobs=np.arange(32, dtype=np.float32).tobytes(), likeliest=likeliest)
        answers[link] = done
        expected |= step_results(batch, rank, done)
    done = link_pb2.HostStepDone.FromString(host_step_done(read, answers).SerializeToString())
    assert host_results(batch, HostAnswer(list(LINKS), done)) == expected
    assert list(done.compiles) == list(LINKS)
    assert np.frombuffer(done.times, np.float32).reshape(-1, 3)[:, 2].tolist() == list(LINKS)
