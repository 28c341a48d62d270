"""Changed tensors as the messages that a client sends."""

import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from serving.api.grpc.resilience_messages import tensor_update_to_proto
from serving.proto.moejax.v1 import resilience_pb2
from serving.protocol.tensors import TensorUpdate

CHUNK = 2 << 20
"""Bytes of a tensor in one message."""


class TensorParts:
    """An iterator over the messages of an update. `error` is what the iterable of tensors raised: gRPC then ends the
    call, and keeps it to itself."""

    def __init__(self, update: TensorUpdate, tensors: Iterable[tuple[str, Any]]) -> None:
        self.error: Exception | None = None
        self._parts = _parts(update, tensors)

    def __iter__(self) -> "TensorParts":
        return self

    def __next__(self) -> resilience_pb2.TensorPart:
        try:
            return next(self._parts)
        except StopIteration:
            raise
        except Exception as error:
            self.error = error
            raise


def _parts(update: TensorUpdate, tensors: Iterable[tuple[str, Any]]) -> Iterator[resilience_pb2.TensorPart]:
    yield resilience_pb2.TensorPart(update=tensor_update_to_proto(update))
    count = 0
    for name, given in tensors:
        array = np.ascontiguousarray(given)
        numbers, crc32 = array.reshape(-1).view(np.uint8), 0
        tensor = resilience_pb2.Tensor(name=name, dtype=array.dtype.name, shape=np.shape(given))
        yield resilience_pb2.TensorPart(tensor=tensor)
        for first in range(0, len(numbers), CHUNK):
            data = numbers[first : first + CHUNK].tobytes()
            crc32 = zlib.crc32(data, crc32)
            yield resilience_pb2.TensorPart(data=data)
        yield resilience_pb2.TensorPart(crc32=crc32)
        count += 1
    yield resilience_pb2.TensorPart(end=count)
