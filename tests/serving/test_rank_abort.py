"""A rank that was told that a mesh is given up never waits for its members, however late it comes to it."""

import types

import pytest

from serving.dial import Way
from serving.mesh_key import MeshKey
from serving.proto.moejax.v1 import link_pb2
from serving.rank import Rank


class Programs:
    """Programs of a mesh, which count how often they are connected."""

    connected = 0

    def connect(self, _device: object) -> None:
        self.connected += 1


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Rank:
    monkeypatch.setattr(Rank, "device", None)
    rank = Rank(0, Way(front="127.0.0.1:1", address="127.0.0.1"))
    rank._shape = types.SimpleNamespace(shared=False)
    rank._meshes[MeshKey((0, 1), 2)] = Programs()
    return rank


def connect(number: int) -> link_pb2.Connect:
    return link_pb2.Connect(mesh=MeshKey((0, 1), 2).message(), number=number)


def test_a_mesh_that_was_given_up_before_its_turn_is_not_connected(rank: Rank) -> None:
    rank.abort(0, connecting=3)
    for number in (2, 3):
        with pytest.raises(RuntimeError, match="given up"):
            rank.connect(connect(number))
    assert not rank._meshes[MeshKey((0, 1), 2)].connected


def test_what_a_front_that_is_gone_wanted_connected_is_not(rank: Rank) -> None:
    rank.forsaken()
    with pytest.raises(RuntimeError, match="given up"):
        rank.connect(connect(1))
    assert not rank._meshes[MeshKey((0, 1), 2)].connected


def test_the_next_one_is_connected(rank: Rank) -> None:
    rank.abort(0, connecting=3)
    rank.connect(connect(4))
    assert rank._meshes[MeshKey((0, 1), 2)].connected == 1
