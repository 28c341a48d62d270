"""A rank's meshes: what is loaded before it is needed, and what a lost rank makes void."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import serving.worker.meshes
from moejax.config.step_inputs import Bucket
from moejax.runtime.distributed import World
from serving.executor.mesh_key import MeshKey
from serving.proto.moejax.v1 import link_pb2
from serving.worker.meshes import SMALL_STEP_ROWS
from serving.worker.rank import RankWorker
from tests.support.models import MIXTRAL, model_folder
from tests.support.worker import make_worker

SMALL, LARGE = (Bucket(decode=rows, tiles=0, max_pages=1) for rows in (SMALL_STEP_ROWS, SMALL_STEP_ROWS + 1))


class Loaded:
    """Programs of a mesh or of a rank alone that note which buckets were loaded."""

    def __init__(self, *_shape: Any) -> None:
        self.buckets: list[int] = []

    def step(self, bucket: int) -> None:
        self.buckets.append(bucket)

    after_step = step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "m"
    model_folder(folder, MIXTRAL)
    return folder


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch, folder: Path) -> RankWorker:
    """Rank 0, whose programs are `Loaded`, with a small bucket and a large one."""
    for name in ("MeshPrograms", "RolePrograms", "LocalPrograms"):
        monkeypatch.setattr(serving.worker.meshes, name, Loaded)
    worker = make_worker(monkeypatch, folder)
    model = worker.state.model
    shape = dataclasses.replace(model.shape, buckets=(LARGE, SMALL))
    worker.state.configured = dataclasses.replace(model, shape=shape)
    worker.meshes._local.clear()
    return worker


def prepare(rank: RankWorker, key: MeshKey, *, urgent: bool = False) -> tuple[list[int], list[int]]:
    """The buckets that are loaded of a mesh, and of the rank alone, after it was prepared."""
    rank.meshes.prepare(link_pb2.Prepare(mesh=key.message(), urgent=urgent))
    mesh, local = rank.meshes.programs(key), rank.meshes.local(key.slots)
    assert isinstance(mesh, Loaded)
    assert isinstance(local, Loaded)
    return mesh.buckets, local.buckets


def test_an_urgent_mesh_has_the_programs_of_small_steps_first(rank: RankWorker) -> None:
    key = MeshKey((0, 1), 2)
    assert prepare(rank, key, urgent=True) == ([1], [1])
    assert prepare(rank, key) == ([1, 0, 1], [1, 0, 1])


def test_an_expert_rank_loads_nothing_of_what_follows_a_step(rank: RankWorker) -> None:
    assert prepare(rank, MeshKey((1, 0), 2, attention=1)) == ([0, 1], [])
    assert prepare(rank, MeshKey((0, 1), 3, attention=1)) == ([0, 1], [0, 1])


def test_nothing_is_loaded_for_a_generation_that_has_ended(rank: RankWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(key: MeshKey) -> Loaded:
        rank.state.generation += 1  # another generation is joined right after
        return Loaded()

    monkeypatch.setattr(rank.meshes, "_load", load)
    assert prepare(rank, MeshKey((0, 1), 2)) == ([], [])


def test_without_small_buckets_the_smallest_counts_as_small(rank: RankWorker) -> None:
    assert (rank.meshes.is_small(SMALL), rank.meshes.is_small(LARGE)) == (True, False)
    model = rank.state.model
    rank.state.configured = dataclasses.replace(model, shape=dataclasses.replace(model.shape, buckets=(LARGE,)))
    assert rank.meshes.is_small(LARGE)


def test_a_new_process_of_a_rank_makes_every_mesh_with_its_predecessor_void(rank: RankWorker) -> None:
    seated: list[tuple[int, int]] = []
    world = SimpleNamespace(devices=lambda ranks: [], set_process_id=lambda *seat: seated.append(seat))
    rank.state.world = cast(World, world)
    with_it, without = MeshKey((0, 1, 2), 2), MeshKey((0, 2), 3)
    for key in (with_it, without):
        prepare(rank, key)
    rank.meshes.seat(link_pb2.Seat(rank=1, process=7))
    assert seated == [(1, 7)]
    assert isinstance(rank.meshes.programs(without), Loaded)
    with pytest.raises(KeyError):
        rank.meshes.programs(with_it)
