"""Errors as gRPC statuses, for every service."""

import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from serving import wire
from serving.errors import Internal, MoejaxError

log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def statuses(context: Any) -> AsyncIterator[None]:
    """End the call with the status of a MoejaxError; a defect of ours is logged and told without its text."""
    try:
        yield
    except MoejaxError as error:
        await context.abort(*wire.error_status(error))
    except grpc.aio.AbortError:
        raise
    except Exception:
        log.exception("a gRPC call failed")
        error = Internal("internal error; the server's log has the details.")
        await context.abort(*wire.error_status(error))
