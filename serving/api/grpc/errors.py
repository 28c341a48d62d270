"""Errors as gRPC statuses, on the server and in the client.

An error travels as a google.rpc.Status with ErrorInfo (the name of its class, the field at fault) and RetryInfo.
"""

import contextlib
import logging
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from serving.errors import Cancelled, DeadlineExceeded, Internal, InvalidRequest, MoejaxError, QueueFull, Unreachable

DOMAIN = "moejax"
DETAILS_KEY = "grpc-status-details-bin"
"""Metadata key under which gRPC sends a google.rpc.Status."""
_MAX_MESSAGE = 1000
"""Characters of an error's text that are sent: a status travels in HTTP/2 headers, which are small."""

log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def abort_on_error(context: Any) -> AsyncIterator[None]:
    """End the call with the status of a MoejaxError. Any other exception is logged, and the client gets its status
    without its text."""
    try:
        yield
    except MoejaxError as error:
        await context.abort(*error_to_status(error))
    except grpc.aio.AbortError:
        raise
    except Exception:
        log.exception("a gRPC call failed")
        await context.abort(*error_to_status(Internal("internal error; the server's log has the details.")))


def error_to_status(error: MoejaxError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """The status code, the text and the trailing metadata that stand for an error."""
    info = error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=DOMAIN)
    if error.param is not None:
        info.metadata["param"] = error.param
    code, text = grpc.StatusCode[error.grpc_status], str(error)[:_MAX_MESSAGE]
    status = status_pb2.Status(code=code.value[0], message=text, details=[_pack_any(info)])
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        status.details.append(_pack_any(error_details_pb2.RetryInfo(retry_delay=delay)))
    return code, text, ((DETAILS_KEY, status.SerializeToString()),)


def error_from_status(
    code: grpc.StatusCode, text: str, trailers: Iterable[tuple[str, str | bytes]] | None
) -> MoejaxError:
    """The inverse of `error_to_status`. A status of gRPC itself, which has no details, becomes the nearest class."""
    packed = next((v for k, v in trailers or () if k == DETAILS_KEY and isinstance(v, bytes)), b"")
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in status_pb2.Status.FromString(packed).details:
        detail.Unpack(info)
        detail.Unpack(retry)
    kind = {k.__name__: k for k in error_classes()}.get(info.reason) if info.domain == DOMAIN else None
    if kind is not None:
        after = retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None
        return kind(text, param=info.metadata.get("param"), retry_after_s=after)
    if code is grpc.StatusCode.UNAVAILABLE:
        return Unreachable(text)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text:
        return InvalidRequest(text)
    known = {k.grpc_status: k for k in (Cancelled, DeadlineExceeded, InvalidRequest, QueueFull)}
    return known.get(code.name, Internal)(text or f"gRPC status {code.name}")


def error_classes() -> Iterator[type[MoejaxError]]:
    """MoejaxError and all its subclasses."""
    queue: list[type[MoejaxError]] = [MoejaxError]
    while queue:
        kind = queue.pop()
        yield kind
        queue += kind.__subclasses__()


def _pack_any(detail: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
