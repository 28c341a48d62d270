"""The gRPC surface: moejax.v1.Inference, moejax.v1.Resilience, grpc.health.v1 and reflection.

A stream is written message by message and each write waits for the client's flow control window, so a
client that does not read holds up nobody and costs one window. A call that ends, for whatever reason, closes
its generator, which cancels the request.
"""

import asyncio
import contextlib
import dataclasses
import importlib
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from types import ModuleType
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from serving import wire
from serving.bounds import check_tokens
from serving.called import with_calls
from serving.closing import Closing
from serving.config import Settings
from serving.errors import DeadlineExceeded, StartError
from serving.faults import DeviceError, permit
from serving.generation import Conversation, Generation, Item
from serving.guard import Guard
from serving.guard_rpc import RpcGuard
from serving.keys import CALLER
from serving.proto.moejax.v1 import inference_pb2, inference_pb2_grpc, resilience_pb2, resilience_pb2_grpc
from serving.rpc_errors import statuses
from serving.status import Backend
from serving.tls import ServerTls
from serving.version import version

log = logging.getLogger(__name__)

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
RESILIENCE = resilience_pb2.DESCRIPTOR.services_by_name["Resilience"].full_name
LIVENESS = ("", "liveness", RESILIENCE)
"""Health service names that are SERVING as long as the front answers, also through a recovery."""
READINESS = ("readiness", INFERENCE)
"""Health service names that are NOT_SERVING while no request can be served."""

OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second server on the port is an error, not half of the traffic
    # A burst is refused by the queue, with a time to come back; gRPC itself would cancel it.
    ("grpc.server.max_pending_requests", 100_000),
    ("grpc.server.max_pending_requests_hard_limit", 100_000),
    ("grpc.max_send_message_length", 4 << 20),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
)
_HEALTH_INTERVAL_S = 0.1


class RpcServer:
    """A running gRPC server. `port` is the one in use, also when 0 was asked for."""

    def __init__(self, server: grpc.aio.Server, port: int, closing: Closing) -> None:
        self._server = server
        self._closing = closing
        self.port = port

    async def stop(self, grace_s: float | None = None) -> None:
        """Take no new calls, end the watches, wait up to `grace_s` for the rest, then cancel it."""
        self._closing.set()
        await self._server.stop(grace_s)


async def start(
    generation: Generation,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    guard: Guard | None = None,
    tls: ServerTls | None = None,
    vllm: bool = False,
) -> RpcServer:
    """Serve on host:port; with `vllm`, vLLM's service too. Raises StartError when the port cannot be had."""
    closing, guard = Closing(), guard or Guard.of(Settings())
    bounds = (
        ("grpc.max_receive_message_length", guard.max_body_bytes),
        ("grpc.max_metadata_size", guard.max_header_bytes),
        ("grpc.absolute_max_metadata_size", guard.max_header_bytes),
    )
    server = grpc.aio.server(options=OPTIONS + bounds, interceptors=[RpcGuard(guard)])
    inference_pb2_grpc.add_InferenceServicer_to_server(InferenceService(generation, guard.slow_client_s), server)
    backend = generation.backend
    resilience_pb2_grpc.add_ResilienceServicer_to_server(ResilienceService(backend, closing), server)
    health_pb2_grpc.add_HealthServicer_to_server(HealthService(backend, closing), server)
    names = (INFERENCE, RESILIENCE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
    if vllm:
        engine = _vllm()
        engine.add(generation, server, guard.slow_client_s)
        names = (*names, engine.NAME)
    reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)
    try:
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        bound = server.add_insecure_port(address) if tls is None else server.add_secure_port(address, tls.grpc())
    except RuntimeError as error:
        raise StartError(
            f"gRPC cannot listen on {host}:{port}; another program has the port, or the address is not of "
            "this machine. Choose another with --grpc-port, or 0 for any free one."
        ) from error
    await server.start()
    return RpcServer(server, bound, closing)


def _vllm() -> ModuleType:
    """The module of vLLM's service, which needs messages that others do not. Raises StartError without them."""
    try:
        return importlib.import_module("serving.vllm_rpc")
    except ModuleNotFoundError as error:
        raise StartError(f"--vllm-grpc needs {error.name}: pip install 'moejax[vllm]'.") from None


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Generating text."""

    def __init__(self, generation: Generation, slow_client_s: float) -> None:
        self._generation = generation
        self._slow_client_s = slow_client_s

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Any) -> None:
        """Stream one request; the call's deadline is the request's."""
        async with statuses(context):
            params, prompt = wire.sampling_value(request.sampling), wire.prompt_value(request)
            if (guide := wire.tool_guide(request)) is not None:
                params = dataclasses.replace(params, guide=guide)
            accepted = await self._generation.accept_all(
                [prompt],
                params,
                request_id=request.request_id,
                timeout_s=context.time_remaining(),
            )
            tools = isinstance(prompt, Conversation) and bool(prompt.tools)
            stream = self._generation.streams(accepted, params.stop, form={"tools": tools})
            await self._send(with_calls(stream) if tools else stream, context, ())

    async def Resume(self, request: inference_pb2.ResumeRequest, context: Any) -> None:
        """Stream what a caller lacks of a call of its own."""
        async with statuses(context):
            call = self._generation.recall(request.request_id)
            stream = self._generation.again(call)
            if call.form is not None and call.form.get("tools"):
                stream = with_calls(stream)
            await self._send(stream, context, request.after)

    async def _send(self, stream: AsyncGenerator[Item, None], context: Any, after: Sequence[int]) -> None:
        """Write the items of a stream but for those the caller has."""
        sequences: dict[int, int] = {}
        async with contextlib.aclosing(stream) as items:
            async for item in items:
                sequence = sequences[item.choice] = sequences.get(item.choice, 0) + 1
                if item.choice < len(after) and sequence <= after[item.choice]:
                    continue
                message = wire.response_message(item)
                message.sequence = sequence
                try:
                    async with asyncio.timeout(self._slow_client_s):
                        await context.write(message)
                except TimeoutError:
                    raise DeadlineExceeded(f"nothing was read for {self._slow_client_s:g} s.") from None

    async def Abort(self, request: inference_pb2.AbortRequest, context: Any) -> inference_pb2.AbortResponse:
        """Cancel a request by id."""
        async with statuses(context):
            return inference_pb2.AbortResponse(aborted=self._generation.abort(request.request_id))

    async def Tokenize(self, request: inference_pb2.TokenizeRequest, context: Any) -> inference_pb2.TokenIds:
        """The tokens of a prompt."""
        async with statuses(context):
            return inference_pb2.TokenIds(ids=await self._generation.encode(wire.prompt_value(request)))

    async def Detokenize(self, request: inference_pb2.TokenIds, context: Any) -> inference_pb2.DetokenizeResponse:
        """The text of tokens."""
        async with statuses(context):
            check_tokens(tuple(request.ids), self._generation.backend.model.vocab_size, "ids")
            return inference_pb2.DetokenizeResponse(text=self._generation.tokenizer.decode(tuple(request.ids)))

    async def GetModelInfo(self, request: Any, context: Any) -> inference_pb2.ModelInfo:
        """The model being served."""
        async with statuses(context):
            generation = self._generation
            return wire.model_message(generation.backend.model, generation.tokenizer.has_chat_template)

    async def GetServerInfo(self, request: Any, context: Any) -> inference_pb2.ServerInfo:
        """Version, age and size of the server."""
        async with statuses(context):
            status = self._generation.backend.status()
            return inference_pb2.ServerInfo(
                version=version(),
                started_at=status.started_at,
                uptime_s=max(0.0, time.time() - status.started_at),
                ready=status.ready,
                chaos=status.chaos,
                epoch=status.epoch,
                ranks_alive=sum(r.state == "serving" for r in status.ranks),
                ranks_total=len(status.ranks),
            )


class ResilienceService(resilience_pb2_grpc.ResilienceServicer):
    """What the server is made of and what happened to it."""

    def __init__(self, backend: Backend, closing: Closing) -> None:
        self._backend = backend
        self._closing = closing

    async def GetStatus(self, request: Any, context: Any) -> resilience_pb2.Status:
        """The server now."""
        async with statuses(context):
            return wire.status_message(self._backend.status())

    async def Watch(self, request: resilience_pb2.WatchRequest, context: Any) -> None:
        """Events after a sequence, past ones first."""
        async with statuses(context):
            events = self._closing.until(self._backend.watch(request.after))
            async with contextlib.aclosing(events) as items:
                async for event in items:
                    await context.write(wire.event_message(event))

    async def WhatIf(self, request: Any, context: Any) -> resilience_pb2.WhatIfResponse:
        """What the loss of each rank and host would cost now."""
        async with statuses(context):
            prospects, deployment = map(wire.prospect_message, self._backend.what_if()), self._backend.deployment()
            plan = deployment.to_json() if deployment is not None else ""
            return resilience_pb2.WhatIfResponse(prospects=prospects, plan=plan)

    async def Apply(self, request: resilience_pb2.ApplyRequest, context: Any) -> resilience_pb2.ApplyResponse:
        """A planned change, for callers that may operate the server."""
        async with statuses(context):
            self._permit(context)
            serving = await self._backend.apply(wire.instruction_value(request))
            return resilience_pb2.ApplyResponse(serving=serving, epoch=self._backend.status().epoch)

    async def Report(self, request: resilience_pb2.ReportRequest, context: Any) -> resilience_pb2.ReportResponse:
        """A device's error, from callers that may operate the server."""
        async with statuses(context):
            self._permit(context)
            names = ("rank", "level", "code", "message")
            error = DeviceError.read({name: getattr(request, name) for name in names})
            return resilience_pb2.ReportResponse(action=self._backend.report(error).value)

    def _permit(self, context: Any) -> None:
        status = self._backend.status()
        peer = re.sub(r"^ipv[46]:(%5B|\[)?", "", context.peer())
        permit(chaos=status.chaos, operable=status.operable, key=CALLER.get(), peer=peer)

    async def Kill(self, request: resilience_pb2.KillRequest, context: Any) -> resilience_pb2.KillResponse:
        """Kill or stop a rank, on a server started for it."""
        async with statuses(context):
            await self._backend.kill(request.rank, request.signal or "SIGKILL", request.host)
            return resilience_pb2.KillResponse()


class HealthService(health_pb2_grpc.HealthServicer):
    """grpc.health.v1 from the backend's status; nothing is kept that could be out of date."""

    def __init__(self, backend: Backend, closing: Closing) -> None:
        self._backend = backend
        self._closing = closing

    def _health(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        if service in LIVENESS:
            return health_pb2.HealthCheckResponse.SERVING
        if service not in READINESS:
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        status = self._backend.status()
        if status.ready and not status.draining:
            return health_pb2.HealthCheckResponse.SERVING
        return health_pb2.HealthCheckResponse.NOT_SERVING

    async def Check(self, request: Any, context: Any) -> health_pb2.HealthCheckResponse:
        """Health of one service; NOT_FOUND when there is none of that name."""
        health = self._health(request.service)
        if health == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            known = ", ".join(repr(n) for n in (*LIVENESS, *READINESS))
            text = f"no service {request.service!r}; known are {known}."
            await context.abort(grpc.StatusCode.NOT_FOUND, text)
        return health_pb2.HealthCheckResponse(status=health)

    async def Watch(self, request: Any, context: Any) -> None:
        """Health of one service, now and at every change."""
        async with (
            statuses(context),
            contextlib.aclosing(self._closing.until(self._changes(request))) as items,
        ):
            async for health in items:
                await context.write(health_pb2.HealthCheckResponse(status=health))

    async def _changes(self, request: Any) -> AsyncIterator[health_pb2.HealthCheckResponse.ServingStatus]:
        last = None
        while True:
            health = self._health(request.service)
            if health != last:
                yield health
            last = health
            await asyncio.sleep(_HEALTH_INTERVAL_S)
