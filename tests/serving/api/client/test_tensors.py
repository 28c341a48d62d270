"""A client sends arrays as they are, and raises what their iterable raises."""

from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from serving.api.client import AsyncClient, Client
from serving.api.client.tensors import CHUNK
from serving.errors import InvalidRequest
from serving.protocol.tensors import TensorTarget, TensorType, TensorUpdate
from tests.support.fake_backend import FakeBackend
from tests.support.fake_server import FakeServer

LARGE = np.random.default_rng(0).normal(size=(3, CHUNK // 8 + 5))
HALF = np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16)
SCALAR = np.int32(5)
TENSORS = [("large", LARGE), ("half", HALF[:, ::-1]), ("scalar", SCALAR)]


@pytest.fixture(autouse=True)
def _target(backend: FakeBackend, tmp_path: Path) -> None:
    known = {name: TensorType(array.dtype.name, array.shape, array.nbytes) for name, array in TENSORS}
    backend.tensors = TensorTarget(folder=str(tmp_path), base_version="6", tensors=known)
    backend.operable = True


def test_arrays_arrive_as_they_are(server: FakeServer, backend: FakeBackend) -> None:
    with Client(server) as client:
        serving = client.apply_tensors(TENSORS, version="7", base_version="6", running="finish", timeout_s=5)
    assert serving == [0, 1, 2, 3]
    assert backend.changed == {name: array.tobytes() for name, array in TENSORS}
    assert backend.updates == [TensorUpdate(version="7", base_version="6", running="finish", timeout_s=5)]


@pytest.mark.anyio
async def test_so_they_do_from_asyncio(server: FakeServer, backend: FakeBackend) -> None:
    async with AsyncClient(server) as client:
        assert await client.apply_tensors(iter(TENSORS)) == [0, 1, 2, 3]
        with pytest.raises(InvalidRequest, match="'other' is none of the 3 tensors"):
            await client.apply_tensors([("other", SCALAR)])
        with pytest.raises(ZeroDivisionError):
            await client.apply_tensors(broken())
    assert backend.changed == {name: array.tobytes() for name, array in TENSORS}


def broken() -> Iterator[tuple[str, np.ndarray]]:
    yield TENSORS[0]
    raise ZeroDivisionError


def test_an_iterable_that_raises_changes_nothing(server: FakeServer, backend: FakeBackend) -> None:
    with Client(server) as client, pytest.raises(ZeroDivisionError):
        client.apply_tensors(broken())
    assert backend.updates == []


def test_an_update_that_cannot_be_is_refused_before_anything_is_sent(server: FakeServer) -> None:
    with Client(server) as client, pytest.raises(InvalidRequest, match="running is 'later'"):
        client.apply_tensors(TENSORS, running="later")  # type: ignore[arg-type]
