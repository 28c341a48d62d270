"""Starts the gRPC server: moejax.v1.Inference, moejax.v1.Resilience, grpc.health.v1 and reflection.

A stream is written message by message, and each write waits for the client's flow control window: a client that does
not read holds up no other client and costs one window of memory. When a call ends, for whatever reason, its generator
is closed, which cancels the request.
"""

import importlib
from types import ModuleType

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from serving.api.grpc import health_service, inference_service, resilience_service
from serving.api.grpc.health_service import HealthService
from serving.api.grpc.inference_service import InferenceService
from serving.api.grpc.interceptor import LimitsInterceptor
from serving.api.grpc.resilience_service import ResilienceService
from serving.api.shutdown import Shutdown
from serving.auth.limits import CallLimits
from serving.auth.tls import ServerTls
from serving.config import Settings
from serving.core.request_processor import RequestProcessor
from serving.errors import StartError, missing_extra
from serving.proto.moejax.v1 import inference_pb2_grpc, resilience_pb2_grpc

SERVER_OPTIONS = (
    # The queue refuses a burst with a time to come back; gRPC alone would cancel the calls without one.
    ("grpc.server.max_pending_requests", 100_000),
    ("grpc.server.max_pending_requests_hard_limit", 100_000),
    ("grpc.max_send_message_length", 4 << 20),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
)


class GrpcServer:
    """A running gRPC server. `port` is the port in use, also when 0 was given."""

    def __init__(self, server: grpc.aio.Server, port: int, shutdown: Shutdown) -> None:
        self._server = server
        self._shutdown = shutdown
        self.port = port

    async def stop(self, grace_s: float | None = None) -> None:
        """Refuse new calls, end the Watch streams, and cancel the other calls after `grace_s` seconds."""
        self._shutdown.begin()
        await self._server.stop(grace_s)


async def start_grpc(
    processor: RequestProcessor,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    limits: CallLimits | None = None,
    tls: ServerTls | None = None,
    vllm: bool = False,
    shared: bool = False,
) -> GrpcServer:
    """Serve on host:port, with `vllm` also the service of vLLM, with `shared` beside other processes at the same
    port. Raises StartError when the port cannot be opened."""
    shutdown, limits = Shutdown(), limits or CallLimits.of(Settings())
    bounds = (
        ("grpc.max_receive_message_length", limits.max_body_bytes),
        ("grpc.max_metadata_size", limits.max_header_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_header_bytes),
    )
    # Not shared: a second server on the same port fails instead of taking half of the traffic.
    server = grpc.aio.server(
        options=(*SERVER_OPTIONS, ("grpc.so_reuseport", int(shared)), *bounds), interceptors=[LimitsInterceptor(limits)]
    )
    inference_pb2_grpc.add_InferenceServicer_to_server(InferenceService(processor, limits.slow_client_s), server)
    backend = processor.backend
    resilience_pb2_grpc.add_ResilienceServicer_to_server(ResilienceService(backend, shutdown), server)
    health_pb2_grpc.add_HealthServicer_to_server(HealthService(backend, shutdown), server)
    names = tuple(module.SERVICE_NAME for module in (inference_service, resilience_service, health_service))
    if vllm:
        vllm_module = _vllm_module()
        vllm_module.add_vllm_service(processor, server, limits.slow_client_s)
        names = (*names, vllm_module.SERVICE_NAME)
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
    return GrpcServer(server, bound, shutdown)


def _vllm_module() -> ModuleType:
    """The module of vLLM's service, imported only here because its messages are an optional dependency.

    Raises StartError when they are not installed.
    """
    try:
        return importlib.import_module("serving.api.grpc.vllm")
    except ModuleNotFoundError as error:
        raise missing_extra("--vllm-grpc", error.name, "vllm") from None
