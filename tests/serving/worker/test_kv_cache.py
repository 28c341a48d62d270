"""Cache entries of a rank: they come to another rank, or back from a replica, with the same bits."""

import dataclasses
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import pytest

from moejax.config.kv_cache import bytes_per_token, cache_shapes
from moejax.config.model_config import ModelConfig
from moejax.runtime.kv_transfer import read_entries
from planner.inputs.cache_formats import CACHE_FORMATS
from serving.engine.page_pool import KEY_BYTES
from serving.executor.kv_replica import NotReplicated
from serving.executor.mesh_key import MeshKey
from serving.proto.moejax.v1 import link_pb2
from serving.recovery.kv_replicas import KVReplicas
from serving.worker.kv_replicator import KVReplicator
from serving.worker.rank import RankWorker
from serving.worker.state import AdoptedPlan, CommittedStep
from tests.support.models import MIXTRAL, model_folder
from tests.support.worker import PAGE, PAGES, SLOTS, make_worker

TOKENS = np.arange(100, 120, dtype=np.int32)


@pytest.fixture(params=CACHE_FORMATS)
def cfg(request: pytest.FixtureRequest) -> ModelConfig:
    """The model with a cache of each format."""
    return dataclasses.replace(MIXTRAL, cache_format=request.param)


@pytest.fixture
def rows(cfg: ModelConfig) -> np.ndarray:
    """Keys and values of twenty positions, bytes `[L, 20, bytes of a layer]`."""
    draw, shapes = np.random.default_rng(1), cache_shapes(cfg, len(TOKENS))
    held = jax.tree.map(lambda each: (100 * draw.standard_normal(each.shape)).astype(each.dtype), shapes)
    return read_entries(held, np.arange(len(TOKENS)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "m"
    model_folder(folder, MIXTRAL)
    return folder


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch, folder: Path, cfg: ModelConfig) -> list[RankWorker]:
    """Two ranks that serve."""
    made = [make_worker(monkeypatch, folder, rank, cfg) for rank in range(2)]
    for rank in made:
        routes = np.zeros(rank.state.model.arrays.routes_shape, np.int32)
        rank.state.plan = AdoptedPlan(1, MeshKey((0, 1), SLOTS), lambda packed: packed, routes)
    return made


def write(rank: RankWorker, rows: np.ndarray, pages: list[int], first: int = 0) -> None:
    """Write positions from `first` on of a sequence in these pages."""
    tokens = TOKENS[first : first + rows.shape[1]].tobytes()
    message = {"pages": pages, "first": first, "count": rows.shape[1], "rows": rows.tobytes(), "tokens": tokens}
    rank.kv_cache.write_cache(link_pb2.WriteCache(**message))


def read(rank: RankWorker, pages: list[int], first: int = 0, count: int = len(TOKENS)) -> np.ndarray:
    """Keys and values of a sequence, bytes `[L, count, bytes of a layer]`."""
    sent = rank.kv_cache.read_cache(link_pb2.ReadCache(pages=pages, first=first, count=count))["rows"]
    return np.frombuffer(sent, np.uint8).reshape(MIXTRAL.n_layers, count, -1)


def test_entries_come_to_other_pages_of_another_rank_with_the_same_bits(
    ranks: list[RankWorker], rows: np.ndarray
) -> None:
    here, there = [5, 0, 9], [1, 11, 2]
    write(ranks[0], rows, here)
    for first, count in ((0, 7), (7, 13)):
        write(ranks[1], read(ranks[0], here, first, count), there, first)
    np.testing.assert_array_equal(read(ranks[1], there), rows)
    np.testing.assert_array_equal(read(ranks[0], here), rows)


def test_a_page_that_is_written_is_known_as_full_no_more(ranks: list[RankWorker], rows: np.ndarray) -> None:
    index = ranks[0].state.prefix_index
    pages = np.array([5, 7], np.int32)
    index.add(link_pb2.FullPages(pages=pages.tobytes(), keys=bytes(2 * KEY_BYTES)))
    write(ranks[0], rows, [5, 0, 9])
    assert index.message().pages == pages[1:].tobytes()


def test_entries_of_a_dead_rank_come_back_from_its_replica_and_no_others(
    ranks: list[RankWorker], rows: np.ndarray, cfg: ModelConfig
) -> None:
    replicas = KVReplicas.create("memory", 2, entries=PAGES * PAGE, entry_bytes=bytes_per_token(cfg))
    try:
        for rank in range(2):
            ranks[rank].kv_cache.set_replication(replicas.assign(rank))
        write(ranks[0], rows, [5, 0, 9])
        replica = ranks[0].kv_cache.replica_path
        found = {"pages": [4, 3, 2], "from_pages": [5, 0, 9], "first": 0, "count": len(TOKENS), "cache_copy": replica}
        with pytest.raises(NotReplicated):
            ranks[1].kv_cache.restore_cache(link_pb2.RestoreCache(**found, tokens=(TOKENS + 1).tobytes()))
        ranks[1].kv_cache.restore_cache(link_pb2.RestoreCache(**found, tokens=TOKENS.tobytes()))
        np.testing.assert_array_equal(read(ranks[1], [4, 3, 2]), rows)
        # What was restored is in the replica of the rank that has it now, so that it survives that one too.
        found |= {"pages": [8, 6, 7], "from_pages": [4, 3, 2], "cache_copy": ranks[1].kv_cache.replica_path}
        ranks[0].kv_cache.restore_cache(link_pb2.RestoreCache(**found, tokens=TOKENS.tobytes()))
        np.testing.assert_array_equal(read(ranks[0], [8, 6, 7]), rows)
    finally:
        replicas.close()


def test_a_rank_that_cannot_copy_goes_on_without_a_replica(
    ranks: list[RankWorker], rows: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    kv_cache = ranks[0].kv_cache
    kv_cache._replicator = KVReplicator(None)
    kv_cache.note_committed(cast(CommittedStep, cast(Any, object())))  # nothing that can be copied
    kv_cache.replicate()
    assert kv_cache.take_reports() == []
    assert kv_cache.replica_path == ""
    assert "the cache is not copied any more" in capsys.readouterr().err
    write(ranks[0], rows, [5, 0, 9])
    np.testing.assert_array_equal(read(ranks[0], [5, 0, 9]), rows)
