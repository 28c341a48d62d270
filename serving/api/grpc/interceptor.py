"""The guard around the gRPC surface: keys from the metadata, places for streams."""

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from serving import wire
from serving.errors import MoejaxError
from serving.guard import Guard
from serving.tracing import TRACEPARENT

OPEN = ("/grpc.health.v1.Health/", "/grpc.reflection.")
"""What probes and tools may call without a key."""
OPERATING = "/moejax.v1.Resilience/"
LOOKING = tuple(OPERATING + name for name in ("GetStatus", "Watch", "WhatIf"))
"""What any key may ask of that service; all else there changes the server and takes an admin's."""
GENERATING = ("/moejax.v1.Inference/Generate", "/moejax.v1.Inference/Resume", "/vllm.grpc.engine.VllmEngine/Generate")


class RpcGuard(grpc.aio.ServerInterceptor):
    """Looks at every call before its method does."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """The handler of the call, or one that refuses it."""
        handler, method = await continuation(details), str(details.method)
        if handler is None or method.startswith(OPEN):
            return handler
        metadata = {str(name).lower(): value for name, value in details.invocation_metadata or ()}
        TRACEPARENT.set(str(metadata.get("traceparent", "")))
        authorization = metadata.get("authorization")
        try:
            text = authorization.decode(errors="replace") if isinstance(authorization, bytes) else authorization
            self._guard.admit(text, admin=method.startswith(OPERATING) and method not in LOOKING)
        except MoejaxError as error:
            return _replaced(handler, _refusing(error))
        return _replaced(handler, self._counted(handler.unary_stream)) if method in GENERATING else handler

    def _counted(self, behaviour: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        async def call(request: Any, context: Any) -> None:
            try:
                place = self._guard.stream()
                place.__enter__()
            except MoejaxError as error:
                await context.abort(*wire.error_status(error))
                return
            try:
                result = behaviour(request, context)
                if inspect.isawaitable(result):
                    await result
                else:
                    async for message in result:
                        await context.write(message)
            finally:
                place.__exit__(None, None, None)

        return call


def _refusing(error: MoejaxError) -> Callable[[Any, Any], Awaitable[None]]:
    async def refuse(_request: Any, context: Any) -> None:
        await context.abort(*wire.error_status(error))

    return refuse


def _replaced(handler: Any, behaviour: Any) -> Any:
    """The same kind of handler with another behaviour."""
    coding = {
        "request_deserializer": handler.request_deserializer,
        "response_serializer": handler.response_serializer,
    }
    if handler.unary_unary is not None:
        return grpc.unary_unary_rpc_method_handler(behaviour, **coding)
    if handler.unary_stream is not None:
        return grpc.unary_stream_rpc_method_handler(behaviour, **coding)
    if handler.stream_unary is not None:
        return grpc.stream_unary_rpc_method_handler(behaviour, **coding)
    return grpc.stream_stream_rpc_method_handler(behaviour, **coding)
