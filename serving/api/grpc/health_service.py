"""The service grpc.health.v1.Health: liveness and readiness."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.api.grpc import inference_service, resilience_service
from serving.api.grpc.errors import abort_on_error
from serving.api.shutdown import Shutdown
from serving.protocol.backend import Backend, answered

SERVICE_NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
LIVENESS = ("", "liveness", resilience_service.SERVICE_NAME)
"""Names that are SERVING as long as the front answers, also during a recovery."""
READINESS = ("readiness", inference_service.SERVICE_NAME)
"""Names that are NOT_SERVING while no request can be served."""
_POLL_S = 0.1
"""Seconds between two looks at the status for Watch."""


class HealthService(health_pb2_grpc.HealthServicer):
    """The service over a `Backend`. Every answer is read from its status, so that none is out of date."""

    def __init__(self, backend: Backend, shutdown: Shutdown) -> None:
        self._backend = backend
        self._shutdown = shutdown

    async def _health(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        if service in LIVENESS:
            return health_pb2.HealthCheckResponse.SERVING
        if service not in READINESS:
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        if self._backend.recovering:
            return health_pb2.HealthCheckResponse.NOT_SERVING
        status = await answered(self._backend.status())
        if status.ready and not status.draining:
            return health_pb2.HealthCheckResponse.SERVING
        return health_pb2.HealthCheckResponse.NOT_SERVING

    async def Check(self, request: Any, context: Any) -> health_pb2.HealthCheckResponse:
        """The health of one service; NOT_FOUND when no service has that name."""
        health = await self._health(request.service)
        if health == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            known = ", ".join(repr(n) for n in (*LIVENESS, *READINESS))
            text = f"no service {request.service!r}; known are {known}."
            await context.abort(grpc.StatusCode.NOT_FOUND, text)
        return health_pb2.HealthCheckResponse(status=health)

    async def Watch(self, request: Any, context: Any) -> None:
        """The health of one service now, and again whenever it changes."""
        async with (
            abort_on_error(context),
            contextlib.aclosing(self._shutdown.until(self._changes(request))) as items,
        ):
            async for health in items:
                await context.write(health_pb2.HealthCheckResponse(status=health))

    async def _changes(self, request: Any) -> AsyncIterator[health_pb2.HealthCheckResponse.ServingStatus]:
        last = None
        while True:
            health = await self._health(request.service)
            if health != last:
                yield health
            last = health
            await asyncio.sleep(_POLL_S)
