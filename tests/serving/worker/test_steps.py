"""Steps on a rank: what is refused, what a step takes of the one before, and that a bad one leaves no trace.

The model can be worked out by hand: a row's hidden state and its keys and values are its token, and the next token is
one more. A row of token BAD is not a number.
"""

import dataclasses
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config.kv_cache import KVCache, cache_shapes
from moejax.config.step_inputs import unpack
from moejax.model.decoder import StepOutputs
from moejax.model.mtp import DraftOutputs
from moejax.runtime.programs import MeshPrograms
from serving.engine.batch import Batch, ScheduledRequest, StepBucket, prepare_inputs
from serving.executor.mesh_key import MeshKey
from serving.proto.moejax.v1 import link_pb2
from serving.worker.rank import RankWorker
from serving.worker.state import AdoptedPlan
from tests.support.models import MIXTRAL, model_folder
from tests.support.stepping import work
from tests.support.worker import BUCKETS, PAGE, SLOTS, make_worker

KEY = MeshKey((0,), SLOTS)
EPOCH, BAD = 3, 90


class Programs:
    """The step programs of a mesh, run by hand."""

    def step(self, bucket: int) -> Any:
        def run(packed: jax.Array) -> StepOutputs:
            tokens = unpack(packed, BUCKETS[bucket]).tokens
            value = jnp.where(tokens == BAD, jnp.nan, tokens.astype(jnp.float32))
            sizes = cache_shapes(MIXTRAL, len(tokens))
            new = KVCache(*(jnp.broadcast_to(value[None, :, None], size.shape) for size in (sizes.k, sizes.v)))
            hidden = jnp.broadcast_to(value[:, None], (len(tokens), MIXTRAL.d_model))
            return StepOutputs(hidden=hidden, new_kv=new, expert_load=jnp.zeros((1, 4), jnp.int32))

        return run


class DraftingPrograms(MeshPrograms):
    """The same with a layer that drafts: each rank waits there for the others. `drafted` counts how often it ran."""

    def __init__(self) -> None:
        self.drafted = 0

    def step(self, bucket: int) -> Any:
        return Programs().step(bucket)

    def draft(self, bucket: int) -> Any:
        def run(_: Any, outputs: StepOutputs, tokens: jax.Array) -> DraftOutputs:
            self.drafted += 1
            return DraftOutputs(drafts=tokens[:, None], new_kv=outputs.new_kv, expert_load=outputs.expert_load)

        return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "m"
    model_folder(folder, MIXTRAL)
    return folder


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch, folder: Path) -> RankWorker:
    worker = make_worker(monkeypatch, folder)
    worker.meshes._meshes[KEY] = cast(MeshPrograms, Programs())
    routes = np.zeros(worker.state.model.arrays.routes_shape, np.int32)
    worker.state.plan = AdoptedPlan(EPOCH, KEY, lambda packed: packed, routes)
    return worker


def step(number: int, *works: ScheduledRequest, epoch: int = EPOCH, **fields: Any) -> link_pb2.Step:
    """A step of decode rows in bucket 0."""
    batch = Batch(number, epoch, StepBucket(BUCKETS[0].decode, 0), {0: works})
    arrays = prepare_inputs(batch, 0, page_size=PAGE, max_pages=BUCKETS[0].max_pages)
    packed = np.concatenate([array.reshape(-1).view(np.int32) for array in arrays.values()])
    return link_pb2.Step(epoch=epoch, step=number, bucket=0, inputs=packed.tobytes(), **fields)


def run(rank: RankWorker, command: link_pb2.Step) -> link_pb2.Report:
    return rank.steps.step(command, 0.0)


def chosen(report: link_pb2.Report) -> list[int]:
    assert report.HasField("step_done"), report
    return np.frombuffer(report.step_done.tokens, np.int32).tolist()


def cached(rank: RankWorker) -> list[float]:
    """The token that each entry of the cache holds."""
    cache = rank.state.model.arrays.cache
    assert cache is not None
    return np.asarray(cache.k)[0, :, 0].tolist()


def test_a_step_chooses_tokens_and_is_in_the_cache(rank: RankWorker) -> None:
    report = run(rank, step(1, work([11], 5, (2,)), work([20], 0, (4,))))
    assert chosen(report)[:2] == [12, 21]
    assert (report.step_done.epoch, report.step_done.step) == (EPOCH, 1)
    found = cached(rank)
    assert (found[2 * PAGE + 5], found[4 * PAGE]) == (11, 20)
    assert sum(entry != 0 for entry in found) == 2


@pytest.mark.parametrize("place", ["_sample", "_score", "_commit"])
@pytest.mark.parametrize("made_ahead", [True, False])
def test_a_rank_that_fails_alone_takes_part_in_every_exchange_of_its_step_and_of_the_next(
    monkeypatch: pytest.MonkeyPatch, rank: RankWorker, place: str, made_ahead: bool
) -> None:
    programs, model, before = DraftingPrograms(), rank.state.model, cached(rank)
    rank.meshes._meshes[KEY] = programs
    shape = dataclasses.replace(model.shape, cfg=dataclasses.replace(model.shape.cfg, mtp=True))
    rank.state.configured = dataclasses.replace(model, shape=shape)

    def fail(*_: Any) -> None:
        raise ValueError("the device has no memory for it")

    with monkeypatch.context() as patch:
        patch.setattr(type(rank.steps), place, fail)
        failed = run(rank, step(1, work([11], 5, (2,)))).step_failed
    assert failed.error == "the device has no memory for it"
    assert not failed.exchange
    assert programs.drafted == 1, "the other ranks wait for it there"
    sources = np.zeros(4, np.int32).tobytes()
    ahead = {"after": 1, "sources": sources} if made_ahead else {}
    assert run(rank, step(2, work([7], 6, (2,)), **ahead)).HasField("step_failed") == made_ahead
    assert programs.drafted == 2, "they may have begun the next step already"
    assert (cached(rank) == before) == made_ahead


@pytest.mark.parametrize("fails", [False, True])
def test_in_a_step_that_skips_drafts_no_rank_runs_their_layer_nor_waits_there_for_others(
    monkeypatch: pytest.MonkeyPatch, rank: RankWorker, fails: bool
) -> None:
    programs, model = DraftingPrograms(), rank.state.model
    rank.meshes._meshes[KEY] = programs
    shape = dataclasses.replace(model.shape, cfg=dataclasses.replace(model.shape.cfg, mtp=True))
    rank.state.configured = dataclasses.replace(model, shape=shape)

    def fail(*_: Any) -> None:
        raise ValueError("the device has no memory for it")

    if fails:
        monkeypatch.setattr(type(rank.steps), "_sample", fail)
    report = run(rank, step(1, work([11], 5, (2,)), skip_drafts=True))
    assert report.HasField("step_failed") == fails
    assert not report.step_done.drafts
    sources = np.zeros(4, np.int32).tobytes()
    run(rank, step(2, work([7], 6, (2,)), after=1, sources=sources, skip_drafts=True))
    assert programs.drafted == 0
    run(rank, step(3, work([7], 7, (2,))))
    assert programs.drafted == 1


@pytest.mark.parametrize("epoch", [EPOCH - 1, EPOCH + 1])
def test_a_step_of_another_epoch_is_refused_and_leaves_no_trace(rank: RankWorker, epoch: int) -> None:
    before = cached(rank)
    failed = run(rank, step(1, work([11], 5, (2,)), epoch=epoch)).step_failed
    assert (failed.epoch, failed.step) == (epoch, 1)
    assert f"of epoch {epoch}; this rank is in {EPOCH}" in failed.error
    assert cached(rank) == before


def test_a_step_of_an_epoch_that_was_aborted_is_refused(rank: RankWorker) -> None:
    rank.state.aborted_epoch = EPOCH
    assert run(rank, step(1, work([11], 5, (2,)))).HasField("step_failed")


def test_a_step_made_ahead_takes_the_tokens_that_the_step_before_chose(rank: RankWorker) -> None:
    run(rank, step(1, work([11], 5, (2,)), work([20], 0, (4,))))
    sources = np.array([1, -1, 0, -1], np.int32)  # its first row goes on with segment 1, its third with segment 0
    ahead = step(2, work([0], 1, (4,)), work([50], 0, (6,)), work([0], 6, (2,)), after=1, sources=sources.tobytes())
    assert chosen(run(rank, ahead))[:3] == [22, 51, 13]


def test_a_step_made_ahead_of_another_step_than_the_last_one_is_refused(rank: RankWorker) -> None:
    run(rank, step(1, work([11], 5, (2,))))
    sources = np.zeros(4, np.int32).tobytes()
    failed = run(rank, step(3, work([0], 6, (2,)), after=2, sources=sources)).step_failed
    assert "follows step 2" in failed.error


def test_a_step_with_rows_that_are_no_numbers_names_them_and_leaves_no_trace(rank: RankWorker) -> None:
    before = cached(rank)
    failed = run(rank, step(1, work([11], 5, (2,)), work([BAD], 0, (4,)))).step_failed
    assert list(failed.non_finite_rows) == [1]
    assert cached(rank) == before


def test_a_step_made_ahead_of_a_bad_one_is_void_too_and_the_next_one_is_not(rank: RankWorker) -> None:
    before = cached(rank)
    run(rank, step(1, work([BAD], 5, (2,))))
    sources = np.zeros(4, np.int32).tobytes()
    ahead = run(rank, step(2, work([0], 6, (2,)), after=1, sources=sources))
    assert ahead.HasField("step_failed")
    assert list(ahead.step_failed.non_finite_rows) == []
    assert cached(rank) == before
    assert chosen(run(rank, step(3, work([11], 5, (2,)))))[:1] == [12]


def test_padding_is_no_bad_row(rank: RankWorker) -> None:
    command = step(1, work([11], 5, (2,)))
    packed = np.frombuffer(command.inputs, np.int32).copy()
    packed[1] = BAD  # a row without a position
    command.inputs = packed.tobytes()
    assert chosen(run(rank, command))[:1] == [12]


def test_an_idle_rank_runs_the_step_and_writes_nothing(rank: RankWorker) -> None:
    before = cached(rank)
    assert run(rank, link_pb2.Step(epoch=EPOCH, step=1, bucket=0)).HasField("step_done")
    assert cached(rank) == before
