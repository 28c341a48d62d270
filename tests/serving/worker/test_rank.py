"""A rank's commands: each has its handler, and a mesh that was given up is never connected, however late its turn."""

import types
from typing import Any, cast

import pytest

from moejax.runtime.programs import MeshPrograms
from serving.executor.mesh_key import MeshKey
from serving.launch.rank_channel import RankChannel
from serving.proto.moejax.v1 import link_pb2
from serving.worker.front_link import OUT_OF_TURN
from serving.worker.rank import RankWorker
from serving.worker.state import AdoptedPlan, ConfiguredModel, WorkerState

KEY = MeshKey((0, 1), 2)


class Programs:
    """Programs of a mesh, which count how often they are connected."""

    connected = 0

    def connect(self, _device: object) -> None:
        self.connected += 1


@pytest.fixture
def programs() -> Programs:
    return Programs()


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch, programs: Programs) -> RankWorker:
    monkeypatch.setattr(WorkerState, "device", None)
    rank = RankWorker(0, RankChannel(front="127.0.0.1:1", address="127.0.0.1"))
    shape = types.SimpleNamespace(shared_memory=False)
    rank.state.configured = cast(ConfiguredModel, types.SimpleNamespace(shape=shape))
    rank.meshes._meshes[KEY] = cast(MeshPrograms, programs)
    return rank


def connect(number: int) -> link_pb2.Connect:
    return link_pb2.Connect(mesh=KEY.message(), number=number)


def test_every_command_of_the_protocol_has_a_handler(rank: RankWorker) -> None:
    commands = {field.name for field in link_pb2.Command.DESCRIPTOR.oneofs_by_name["what"].fields}
    assert {*rank.handlers, "step", *OUT_OF_TURN} == commands
    assert not {"step", *OUT_OF_TURN} & rank.handlers.keys()


def test_a_handler_has_the_name_of_its_command(rank: RankWorker) -> None:
    names: dict[str, Any] = {name: handler.__name__ for name, handler in rank.handlers.items()}  # type: ignore[attr-defined]
    assert names == {name: name for name in rank.handlers}


def test_a_mesh_that_was_given_up_before_its_turn_is_not_connected(rank: RankWorker, programs: Programs) -> None:
    rank.abort(0, connecting=3)
    for number in (2, 3):
        with pytest.raises(RuntimeError, match="given up"):
            rank.connect(connect(number))
    assert not programs.connected


def test_a_mesh_that_a_lost_front_wanted_is_not_connected(rank: RankWorker, programs: Programs) -> None:
    rank.front_lost()
    with pytest.raises(RuntimeError, match="given up"):
        rank.connect(connect(1))
    assert not programs.connected


def test_a_rank_whose_links_are_cut_stays_in_its_epoch(rank: RankWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    cut: list[tuple[int, ...]] = []
    monkeypatch.setattr(rank.state.world, "abort", cut.append)
    rank.abort(0, 0, links=True)
    assert cut == []
    rank.state.plan = cast(AdoptedPlan, types.SimpleNamespace(epoch=3, mesh=KEY))
    before = rank.state.aborted_epoch
    rank.abort(0, 0, links=True)
    assert (cut, rank.state.aborted_epoch) == ([KEY.ranks], before)
    rank.connect(connect(1))


def test_the_next_mesh_is_connected(rank: RankWorker, programs: Programs) -> None:
    rank.abort(0, connecting=3)
    rank.connect(connect(4))
    assert programs.connected == 1


def test_a_rank_reports_the_highest_epoch_it_was_part_of_also_once_it_has_joined_another_generation(
    rank: RankWorker,
) -> None:
    rank.state.last_epoch, rank.state.plan = 4, None  # as after a Join
    rank.front_lost()
    held = rank.held()
    assert (held.epoch, held.serves) == (4, False)
    rank.abort(6, 0)
    assert rank.held().epoch == 6
