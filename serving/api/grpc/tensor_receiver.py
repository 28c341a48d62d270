"""Receives changed tensors, part by part, and checks everything about them but their numbers' use.

The bytes go to a file: a model need not fit into the memory of the process that receives it.
"""

import asyncio
import json
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

from serving.errors import DeadlineExceeded, InvalidRequest, NoCapacity
from serving.proto.moejax.v1 import resilience_pb2
from serving.protocol.tensors import DATA, TENSORS, TensorTarget, TensorType

AT_ONCE = 64 << 10
"""Bytes up to which a part is written by the event loop itself."""
STALL_S = 60.0
"""Most seconds from one part to the next."""


async def receive_tensors(parts: AsyncIterator[resilience_pb2.TensorPart], target: TensorTarget, folder: Path) -> None:
    """Write the tensors of a stream to a folder. Raises InvalidRequest for a tensor that the target has not, or has
    with another format or shape, for bytes that are missing, too many or other than their checksum says, for a second
    tensor of one name and a stream without its end; DeadlineExceeded for a sender that hangs; NoCapacity when the
    folder cannot be written."""
    try:
        with (folder / DATA).open("wb") as file:
            received = TensorReceiver(target, file)
            async for part in without_stall(parts):
                if len(part.data) <= AT_ONCE:
                    received.take(part)
                else:
                    await asyncio.to_thread(received.take, part)
            described = received.finish()
        (folder / TENSORS).write_text(json.dumps(described))
    except OSError as error:
        raise NoCapacity(f"the tensors cannot be kept on the server's disk: {error}") from None


async def without_stall(parts: AsyncIterator[resilience_pb2.TensorPart]) -> AsyncIterator[resilience_pb2.TensorPart]:
    """The parts. Raises DeadlineExceeded when the next one does not come within STALL_S seconds: a sender that hangs
    would keep its bytes on the server's disk for ever."""
    while True:
        try:
            async with asyncio.timeout(STALL_S):
                part = await anext(parts, None)
        except TimeoutError:
            raise DeadlineExceeded(
                f"no part of the tensors came for {STALL_S:g} s. Begin once more; nothing was changed."
            ) from None
        if part is None:
            return
        yield part


class TensorReceiver:
    """Takes the parts of one stream, after its first message."""

    def __init__(self, target: TensorTarget, file: BinaryIO) -> None:
        self._target = target
        self._file = file
        self._received: dict[str, tuple[str, tuple[int, ...], int]] = {}
        """Format, shape and first byte in the file of each whole tensor."""
        self._name: str | None = None
        """The tensor that has begun."""
        self._size = self._crc32 = 0
        """Its bytes so far."""
        self._written = 0
        self._ended = False

    def take(self, part: resilience_pb2.TensorPart) -> None:
        """The next part. Raises InvalidRequest and OSError."""
        if self._ended:
            raise InvalidRequest("a part comes after the end. Send the end last.", param="end")
        match part.WhichOneof("part"):
            case "tensor":
                self._begin(part.tensor)
            case "data":
                self._add(part.data)
            case "crc32":
                self._complete(part.crc32)
            case "end":
                self._end(part.end)
            case other:
                raise InvalidRequest(f"a part has {other or 'nothing'}; it must have tensor, data, crc32 or end.")

    def finish(self) -> dict[str, tuple[str, tuple[int, ...], int]]:
        """Format, shape and first byte of all tensors, by name. Raises InvalidRequest for a stream without its end."""
        if not self._ended:
            where = f"within tensor {self._name}" if self._name is not None else "without its end"
            raise InvalidRequest(f"the stream ends {where}, after {len(self._received)} tensors.", param="end")
        return self._received

    def _begin(self, tensor: resilience_pb2.Tensor) -> None:
        name, known = tensor.name, self._target.tensors
        if self._name is not None:
            raise InvalidRequest(f"tensor {name} begins before the checksum of tensor {self._name}.", param="tensor")
        if name in self._received:
            raise InvalidRequest(f"tensor {name} is sent a second time. Send each tensor once.", param="name")
        if name not in known:
            raise InvalidRequest(
                f"tensor {name[:200]!r} is none of the {len(known)} tensors of the served model, which are named as in "
                f"its folder, such as {min(known, default='')}.",
                param="name",
            )
        ours, shape = known[name], tuple(tensor.shape)
        if tensor.dtype != ours.dtype:
            raise InvalidRequest(
                f"tensor {name} is of {tensor.dtype[:40]!r}, and that of the served model of {ours.dtype!r}.",
                param="dtype",
            )
        if shape != ours.shape:
            raise InvalidRequest(
                f"tensor {name} has shape {list(shape)}, and that of the served model {list(ours.shape)}.",
                param="shape",
            )
        self._name, self._size, self._crc32 = name, 0, 0

    def _add(self, data: bytes) -> None:
        name, tensor = self._open("data")
        if not data:
            raise InvalidRequest(f"a part of tensor {name} has no bytes.", param="data")
        self._size += len(data)
        if self._size > tensor.bytes:
            raise InvalidRequest(
                f"{self._size} bytes of tensor {name} are sent, and it has {tensor.bytes}.", param="data"
            )
        self._crc32 = zlib.crc32(data, self._crc32)
        self._file.write(data)

    def _complete(self, crc32: int) -> None:
        name, tensor = self._open("crc32")
        if self._size < tensor.bytes:
            raise InvalidRequest(
                f"{self._size} bytes of tensor {name} are sent before its checksum, and it has {tensor.bytes}.",
                param="data",
            )
        if self._crc32 != crc32:
            raise InvalidRequest(
                f"the bytes of tensor {name} have CRC-32 {self._crc32:08x}, and its checksum is {crc32:08x}. Send them "
                "again.",
                param="crc32",
            )
        self._received[name] = (tensor.dtype, tensor.shape, self._written)
        self._written += tensor.bytes
        self._name = None

    def _end(self, count: int) -> None:
        if self._name is not None:
            raise InvalidRequest(f"the end comes before the checksum of tensor {self._name}.", param="end")
        if count != len(self._received):
            raise InvalidRequest(f"{len(self._received)} tensors were sent, and the end says {count}.", param="end")
        if not count:
            raise InvalidRequest("no tensor was sent. Send those that differ.", param="end")
        self._ended = True

    def _open(self, what: str) -> tuple[str, TensorType]:
        """The tensor that has begun."""
        if self._name is None:
            raise InvalidRequest(f"a part has {what} before any tensor has begun.", param=what)
        return self._name, self._target.tensors[self._name]
