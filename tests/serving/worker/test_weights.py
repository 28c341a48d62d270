"""Experts of a rank: read from the store once, moved between ranks and rebuilt bit by bit, and checked."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moejax.runtime.expert_parity import ParityError
from moejax.runtime.live_weights import StagedWeights
from serving.executor.mesh_key import MeshKey
from serving.proto.moejax.v1 import link_pb2
from serving.worker.rank import RankWorker
from serving.worker.state import AdoptedPlan, DoneFields
from serving.worker.weights import MAX_DAMAGED_NAMES
from tests.support.models import MIXTRAL, model_folder
from tests.support.worker import SLOTS, make_worker

PIECE = 1000
"""Bytes of a message; an expert is larger and no multiple of it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "m"
    model_folder(folder, MIXTRAL)
    return folder


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[RankWorker]:
    """Two ranks with the same model."""
    return [make_worker(monkeypatch, folder, rank) for rank in range(2)]


def hold(rank: RankWorker, *experts: int) -> DoneFields:
    """Have a rank hold these experts of every layer."""
    slots = np.tile(np.array(experts, np.int32), (MIXTRAL.n_moe_layers, 1))
    return rank.weights.hold(link_pb2.Hold(slots=slots.tobytes(), slots_per_rank=len(experts)))


def move(of: link_pb2.Weights, source: RankWorker, target: RankWorker) -> None:
    """Send weights from one rank to another in pieces."""
    first, size = 0, 1
    checksums: tuple[int, ...] = ()
    while first < size:
        piece = source.weights.read_weights(link_pb2.ReadWeights(of=of, first=first, count=PIECE))
        size, checksums = piece["size"], piece["checksums"] or checksums
        message = {"first": first, "size": size, "rows": piece["rows"], "checksums": checksums}
        target.weights.write_weights(link_pb2.WriteWeights(of=of, **message))
        first += len(piece["rows"])


def test_only_experts_that_are_not_in_a_slot_yet_are_read(ranks: list[RankWorker]) -> None:
    assert hold(ranks[0], 0, 1, 2) == {"experts_loaded": 3 * MIXTRAL.n_moe_layers}
    assert hold(ranks[0], 0, 1, 2) == {"experts_loaded": 0}
    assert hold(ranks[0], 0, 3, 2) == {"experts_loaded": MIXTRAL.n_moe_layers}


def test_an_expert_that_came_from_another_rank_is_not_read_and_has_its_bits(ranks: list[RankWorker]) -> None:
    hold(ranks[0], 0, 1, 2)
    hold(ranks[1], 1, 2, 3)
    for layer in range(MIXTRAL.n_moe_layers):
        move(link_pb2.Weights(layer=layer, experts=[0]), *ranks)
    assert hold(ranks[1], 0, 2, 3) == {"experts_loaded": 0}
    for layer in range(MIXTRAL.n_moe_layers):
        here, there = (rank.state.model.arrays.expert(layer, 0) for rank in ranks)
        np.testing.assert_array_equal(here.gate_up, there.gate_up)
        np.testing.assert_array_equal(here.down, there.down)


def test_a_parity_is_kept_until_the_front_wants_it_no_more(ranks: list[RankWorker]) -> None:
    kept, dropped, other = (
        link_pb2.Weights(layer=layer, experts=experts, parity=True)
        for layer, experts in ((0, [0, 1]), (0, [2, 3]), (1, [0, 1]))
    )
    handlers, bits = ranks[0].weights, bytes(range(64))
    for of in (kept, dropped, other):
        handlers.write_weights(link_pb2.WriteWeights(of=of, first=0, size=64, rows=bits))
    handlers.keep_parity(link_pb2.KeepParity(layer=0, parities=[kept]))
    for of in (kept, other):
        assert handlers.read_weights(link_pb2.ReadWeights(of=of, first=60, count=9))["rows"] == bits[60:]
    with pytest.raises(ParityError):
        handlers.read_weights(link_pb2.ReadWeights(of=dropped, first=0, count=1))


def test_the_slot_that_was_damaged_is_found_and_counts_as_empty(
    ranks: list[RankWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = ranks[0]
    hold(rank, 0, 1, 2)
    found: Callable[[], list[tuple[int, int, int]]] = lambda: [  # noqa: E731
        (each.layer, each.slot, each.expert) for each in rank.weights.inspect(link_pb2.Inspect())["missing"]
    ]
    assert found() == []
    monkeypatch.setattr(rank.meshes, "step_arguments", lambda *_: lambda packed: packed)
    routes = np.zeros(rank.state.model.arrays.routes_shape, np.int32)
    rank.state.plan = AdoptedPlan(1, MeshKey((0,), SLOTS), lambda packed: packed, routes)
    (damaged,) = rank.weights.damage(link_pb2.Damage(layer=1, slot=2))["missing"]
    assert found() == [(damaged.layer, damaged.slot, damaged.expert)] == [(1, 2, 2)]
    assert found() == []
    assert hold(rank, 0, 1, 2) == {"experts_loaded": 1}


def test_damaged_common_weights_are_named_but_not_all_of_them(
    ranks: list[RankWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"weight{i}" for i in range(MAX_DAMAGED_NAMES + 2)]
    monkeypatch.setattr(ranks[0].state.model.arrays, "damaged", lambda: names)
    found = ranks[0].weights.inspect(link_pb2.Inspect())
    assert found["damaged"]
    assert found["trouble"] == ", ".join(names[:MAX_DAMAGED_NAMES])
    some_slots = ranks[0].weights.inspect(link_pb2.Inspect(first=0, count=1))
    assert not some_slots["damaged"], "common weights are checked with all slots"


def version(number: int, folder: Path) -> link_pb2.WeightsVersion:
    return link_pb2.WeightsVersion(number=number, store=str(folder))


def test_a_rank_has_the_weights_that_a_plan_names_staged_or_not(ranks: list[RankWorker], tmp_path: Path) -> None:
    model_folder(tmp_path / "other", MIXTRAL, seed=9)
    for rank in ranks:
        hold(rank, 0, 1, 2)
    parity = link_pb2.Weights(layer=0, experts=[0, 1], parity=True)
    ranks[0].weights.write_weights(link_pb2.WriteWeights(of=parity, first=0, size=8, rows=bytes(8)))
    ranks[0].weights.stage_weights(link_pb2.StageWeights(version=version(1, tmp_path / "other")))
    before = np.array(ranks[0].state.model.arrays.expert(0, 0).gate_up)
    np.testing.assert_array_equal(before, ranks[1].state.model.arrays.expert(0, 0).gate_up)
    for rank in ranks:  # the second one has staged nothing
        rank.weights.use(version(1, tmp_path / "other"))
    after = ranks[0].state.model.arrays.expert(0, 0).gate_up
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(after, ranks[1].state.model.arrays.expert(0, 0).gate_up)
    assert [rank.state.weights for rank in ranks] == [1, 1]
    assert not ranks[0].state.staged
    assert hold_version(ranks[0], 1) == {"experts_loaded": 0}
    with pytest.raises(ParityError, match="is not kept here"):
        ranks[0].weights.read_weights(link_pb2.ReadWeights(of=parity, first=0, count=8))


def hold_version(rank: RankWorker, number: int) -> DoneFields:
    slots = np.tile(np.array((0, 1, 2), np.int32), (MIXTRAL.n_moe_layers, 1))
    weights = link_pb2.WeightsVersion(number=number)
    return rank.weights.hold(link_pb2.Hold(slots=slots.tobytes(), slots_per_rank=3, weights=weights))


def test_staged_weights_are_dropped_when_the_front_names_no_store(ranks: list[RankWorker], tmp_path: Path) -> None:
    model_folder(tmp_path / "other", MIXTRAL, seed=9)
    hold(ranks[0], 0, 1, 2)
    ranks[0].weights.stage_weights(link_pb2.StageWeights(version=version(1, tmp_path / "other")))
    assert list(ranks[0].state.staged) == [1]
    ranks[0].weights.stage_weights(link_pb2.StageWeights(version=link_pb2.WeightsVersion(number=0)))
    assert not ranks[0].state.staged


def test_a_new_front_drops_what_the_one_before_staged_or_is_still_loading(
    ranks: list[RankWorker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_folder(tmp_path / "other", MIXTRAL, seed=9)
    weights, state = ranks[0].weights, ranks[0].state
    ranks[0]._configured = link_pb2.Configure()  # by the front before
    hold(ranks[0], 0, 1, 2)
    stage = link_pb2.StageWeights(version=version(1, tmp_path / "other"))
    weights.stage_weights(stage)
    ranks[0].configure(link_pb2.Configure(weights=1))  # the front had decided on them
    assert list(state.staged) == [1]
    ranks[0].configure(link_pb2.Configure(weights=0))
    assert not state.staged
    load = weights._load

    def load_while_the_front_changes(store: str) -> StagedWeights:
        staged = load(store)
        ranks[0].configure(link_pb2.Configure(weights=0))
        return staged

    monkeypatch.setattr(weights, "_load", load_while_the_front_changes)
    weights.stage_weights(stage)
    assert not state.staged
