"""Changed tensors arrive whole and as their sender had them, or are refused by name, and nothing is kept."""

import asyncio
import dataclasses
import errno
import zlib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest

from serving.proto.moejax.v1 import resilience_pb2, resilience_pb2_grpc
from serving.proto.moejax.v1.resilience_pb2 import Tensor, TensorPart, TensorUpdate
from serving.protocol import tensors
from serving.protocol.tensors import TensorTarget, TensorType
from tests.support.fake_backend import FakeBackend
from tests.support.grpc_clients import connected, details
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

ARRAY = np.arange(40_000, dtype=np.float32)
BYTES = ARRAY.tobytes()
CRC = zlib.crc32(BYTES)
UPDATE = TensorPart(update=TensorUpdate(version="7"))
BEGIN = TensorPart(tensor=Tensor(name="a", dtype="float32", shape=[200, 200]))
HALVES = [TensorPart(data=BYTES[:80_000]), TensorPart(data=BYTES[80_000:])]
DONE, END = TensorPart(crc32=CRC), TensorPart(end=1)
WHOLE = [UPDATE, BEGIN, *HALVES, DONE]


@pytest.fixture
def target(backend: FakeBackend, tmp_path: Path) -> TensorTarget:
    known = {"a": TensorType("float32", (200, 200), len(BYTES)), "b": TensorType("bfloat16", (2,), 4)}
    backend.tensors = TensorTarget(folder=str(tmp_path), base_version="6", tensors=known)
    backend.operable = True
    return backend.tensors


async def send(backend: FakeBackend, parts: Iterable[TensorPart]) -> resilience_pb2.ApplyResponse:
    async with connected(backend) as (_, channel):
        return await resilience_pb2_grpc.ResilienceStub(channel).ApplyTensors(iter(parts))


async def test_tensors_arrive_as_they_were_sent_and_their_folder_is_removed(backend, target, tmp_path):
    small = [
        TensorPart(tensor=Tensor(name="b", dtype="bfloat16", shape=[2])),
        TensorPart(data=b"abcd"),
        TensorPart(crc32=zlib.crc32(b"abcd")),
    ]
    response = await send(backend, [*WHOLE, *small, TensorPart(end=2)])
    assert list(response.serving) == [0, 1, 2, 3]
    assert backend.changed == {"a": BYTES, "b": b"abcd"}
    assert backend.updates == [tensors.TensorUpdate(version="7", base_version="6")]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([], "first message must have update"),
        ([BEGIN, *HALVES, DONE, END], "first message must have update"),
        ([UPDATE], "ends without its end, after 0 tensors"),
        ([UPDATE, TensorPart(end=0)], "no tensor was sent"),
        ([*WHOLE, UPDATE], "a part has update; it must have tensor"),
        ([UPDATE, TensorPart()], "a part has nothing; it must have tensor"),
        (WHOLE, "ends without its end, after 1 tensors"),
        (WHOLE[:-1], "ends within tensor a, after 0 tensors"),
        ([*WHOLE, TensorPart(end=2)], "1 tensors were sent, and the end says 2"),
        ([*WHOLE, END, BEGIN], "a part comes after the end"),
        ([*WHOLE[:-1], END], "the end comes before the checksum of tensor a"),
        ([*WHOLE, BEGIN], "tensor a is sent a second time"),
        ([*WHOLE[:-1], BEGIN], "tensor a begins before the checksum of tensor a"),
        ([UPDATE, HALVES[0]], "a part has data before any tensor has begun"),
        ([UPDATE, DONE], "a part has crc32 before any tensor has begun"),
        ([*WHOLE, HALVES[0]], "a part has data before any tensor has begun"),
        ([UPDATE, BEGIN, HALVES[0], DONE], "80000 bytes of tensor a are sent before its checksum, and it has 160000"),
        ([*WHOLE[:-1], TensorPart(data=b"x")], "160001 bytes of tensor a are sent, and it has 160000"),
        ([UPDATE, BEGIN, TensorPart(data=b"")], "a part of tensor a has no bytes"),
        ([*WHOLE[:-1], TensorPart(crc32=1)], f"have CRC-32 {CRC:08x}, and its checksum is 00000001"),
        ([UPDATE, BEGIN, *HALVES[::-1], DONE], f"and its checksum is {CRC:08x}"),
        (
            [UPDATE, TensorPart(tensor=Tensor(name="c", dtype="float32", shape=[1]))],
            "tensor 'c' is none of the 2 tensors of the served model, which are named as in its folder, such as a",
        ),
        (
            [UPDATE, TensorPart(tensor=Tensor(name="a", dtype="bfloat16", shape=[200, 200]))],
            "tensor a is of 'bfloat16', and that of the served model of 'float32'",
        ),
        (
            [UPDATE, TensorPart(tensor=Tensor(name="a", dtype="float32", shape=[40_000]))],
            r"tensor a has shape [40000], and that of the served model [200, 200]",
        ),
        ([TensorPart(update=TensorUpdate(running="stop"))], "running is 'stop'; it must be finish or switch"),
        ([TensorPart(update=TensorUpdate(timeout_s=-1))], "timeout_s is -1"),
        ([TensorPart(update=TensorUpdate(version="x" * 65))], "at most 64 printable ASCII characters"),
    ],
)
async def test_another_stream_is_refused_and_nothing_is_kept(backend, target, tmp_path, parts, says):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await send(backend, parts)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert says in (caught.value.details() or "")
    assert details(caught.value)[0].reason == "InvalidRequest"
    assert (backend.updates, list(tmp_path.iterdir())) == ([], [])


async def test_a_sender_that_breaks_off_leaves_nothing(backend, target, tmp_path):
    async def parts() -> AsyncIterator[TensorPart]:
        for part in WHOLE:
            yield part
        await until(lambda: any(tmp_path.iterdir()))
        call.cancel()

    async with connected(backend) as (_, channel):
        call = resilience_pb2_grpc.ResilienceStub(channel).ApplyTensors(parts())
        assert await call.code() is grpc.StatusCode.CANCELLED
        await until(lambda: not any(tmp_path.iterdir()))
    assert backend.updates == []


async def test_a_sender_that_hangs_is_sent_away_and_leaves_nothing(backend, target, tmp_path, monkeypatch):
    monkeypatch.setattr("serving.api.grpc.tensor_receiver.STALL_S", 0.05)
    ends = asyncio.Event()

    async def parts() -> AsyncIterator[TensorPart]:
        for part in WHOLE:
            yield part
        await ends.wait()

    async with connected(backend) as (_, channel):
        call = resilience_pb2_grpc.ResilienceStub(channel).ApplyTensors(parts())
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "no part of the tensors came for 0.05 s" in (await call.details() or "")
        assert (backend.updates, list(tmp_path.iterdir())) == ([], [])
        ends.set()


async def test_a_full_disk_is_no_capacity_and_nothing_is_kept(backend, target, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("serving.api.grpc.tensor_receiver.TensorReceiver._add", full)
    with pytest.raises(grpc.aio.AioRpcError, match="No space left") as caught:
        await send(backend, [*WHOLE, END])
    assert details(caught.value)[0].reason == "NoCapacity"
    assert list(tmp_path.iterdir()) == []


async def test_a_server_that_is_not_operable_takes_no_tensors(backend, target):
    backend.operable = backend.chaos = False
    with pytest.raises(grpc.aio.AioRpcError, match="--operate") as caught:
        await send(backend, [*WHOLE, END])
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert backend.updates == []


async def test_a_tensor_without_numbers_has_no_data(backend, target):
    backend.tensors = dataclasses.replace(target, tensors={"e": TensorType("float32", (0,), 0)})
    await send(
        backend, [UPDATE, TensorPart(tensor=Tensor(name="e", dtype="float32", shape=[0])), TensorPart(crc32=0), END]
    )
    assert backend.changed == {"e": b""}
