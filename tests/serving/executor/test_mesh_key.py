"""The name of a mesh in messages."""

from hypothesis import given
from hypothesis import strategies as st

from serving.executor.mesh_key import MANY_RANKS, MeshKey


@given(st.lists(st.integers(0, 300), unique=True, min_size=1, max_size=200))
def test_a_mesh_is_read_as_it_was_named(ranks: list[int]) -> None:
    key = MeshKey(tuple(ranks), 3, len(ranks) // 2)
    assert MeshKey.read(key.message()) == key


def test_the_name_of_a_large_mesh_grows_with_the_ranks_that_are_missing() -> None:
    whole = tuple(range(16 * MANY_RANKS))
    for missing in ((), (5,), (5, 6, 90)):
        message = MeshKey(tuple(rank for rank in whole if rank not in missing), 1).message()
        assert len(message.SerializeToString()) < 12 + 6 * len(missing)
