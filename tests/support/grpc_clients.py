"""Channels to a server over the fake backend, and the end of a call as its client sees it."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2

from serving.proto.moejax.v1 import inference_pb2, inference_pb2_grpc
from tests.support.fake_backend import FakeBackend
from tests.support.fake_server import FakeServer, serve


@contextlib.asynccontextmanager
async def connected(backend: FakeBackend) -> AsyncIterator[tuple[FakeServer, grpc.aio.Channel]]:
    """A server, and a channel to it."""
    async with serve(backend) as server, grpc.aio.insecure_channel(server.address) as channel:
        yield server, channel


async def rest_of(call: Any) -> None:
    """Read a call to its end."""
    while await call.read() is not grpc.aio.EOF:
        pass


def details(error: grpc.aio.AioRpcError) -> tuple[error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo]:
    """The reason of a refusal, and when to come back."""
    packed = dict(error.trailing_metadata())["grpc-status-details-bin"]
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in status_pb2.Status.FromString(packed).details:
        detail.Unpack(info)
        detail.Unpack(retry)
    return info, retry


async def refused(channel: grpc.aio.Channel, request: inference_pb2.GenerateRequest) -> grpc.aio.AioRpcError:
    """The error that a request ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in inference_pb2_grpc.InferenceStub(channel).Generate(request):
            pass
    return caught.value
