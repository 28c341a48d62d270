"""Checks every gRPC call before its method runs: the API key in its metadata, and the number of open streams."""

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from serving.api.grpc.errors import error_to_status
from serving.auth.limits import CallLimits
from serving.errors import MoejaxError
from serving.observability.tracing import TRACEPARENT

PUBLIC_PREFIXES = ("/grpc.health.v1.Health/", "/grpc.reflection.")
"""Methods that probes and tools may call without an API key."""
RESILIENCE_PREFIX = "/moejax.v1.Resilience/"
READ_ONLY_METHODS = tuple(RESILIENCE_PREFIX + name for name in ("GetStatus", "Watch", "WhatIf"))
"""Methods of moejax.v1.Resilience that any key may call; the others change the server and need an admin key."""
STREAM_METHODS = (
    "/moejax.v1.Inference/Generate",
    "/moejax.v1.Inference/Resume",
    "/vllm.grpc.engine.VllmEngine/Generate",
)


class LimitsInterceptor(grpc.aio.ServerInterceptor):
    """Applies a `CallLimits` to every call."""

    def __init__(self, limits: CallLimits) -> None:
        self._limits = limits

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """The handler of the call, or a handler that refuses it."""
        handler, method = await continuation(details), str(details.method)
        if handler is None or method.startswith(PUBLIC_PREFIXES):
            return handler
        metadata = {str(name).lower(): value for name, value in details.invocation_metadata or ()}
        TRACEPARENT.set(str(metadata.get("traceparent", "")))
        authorization = metadata.get("authorization")
        try:
            text = authorization.decode(errors="replace") if isinstance(authorization, bytes) else authorization
            self._limits.authorize(text, admin=method.startswith(RESILIENCE_PREFIX) and method not in READ_ONLY_METHODS)
        except MoejaxError as error:
            return _with_behaviour(handler, _aborting_handler(error))
        return _with_behaviour(handler, self._limited(handler.unary_stream)) if method in STREAM_METHODS else handler

    def _limited(self, behaviour: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        async def call(request: Any, context: Any) -> None:
            try:
                slot = self._limits.open_stream()
                slot.__enter__()
            except MoejaxError as error:
                await context.abort(*error_to_status(error))
                return
            try:
                result = behaviour(request, context)
                if inspect.isawaitable(result):
                    await result
                else:
                    async for message in result:
                        await context.write(message)
            finally:
                slot.__exit__(None, None, None)

        return call


def _aborting_handler(error: MoejaxError) -> Callable[[Any, Any], Awaitable[None]]:
    async def refuse(_request: Any, context: Any) -> None:
        await context.abort(*error_to_status(error))

    return refuse


def _with_behaviour(handler: Any, behaviour: Any) -> Any:
    """A handler of the same kind that runs `behaviour`."""
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
