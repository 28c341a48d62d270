"""The part that both clients share: the connection, and each call described once, as a value."""

import dataclasses
import uuid
from collections.abc import Callable, Iterable
from typing import Any, Generic, Protocol, TypeVar

from serving.api.client.options import GenerateOptions, sampling_params
from serving.api.client.prompts import PromptLike, read_prompt, read_tokens
from serving.api.client.streams import ResumableCall
from serving.api.client.tensors import TensorParts
from serving.api.grpc.inference_messages import (
    model_from_proto,
    request_to_proto,
    tokenize_to_proto,
    tokens_to_proto,
)
from serving.api.grpc.resilience_messages import instruction_to_proto, prospect_from_proto, status_from_proto
from serving.auth.tls import ClientTls
from serving.errors import Unreachable
from serving.proto.moejax.v1 import inference_pb2, inference_pb2_grpc, resilience_pb2, resilience_pb2_grpc
from serving.protocol.instructions import Instruction
from serving.protocol.prepared_model import ModelInfo
from serving.protocol.status import LossForecast, Status

DEFAULT_ADDRESS = "127.0.0.1:50051"
RESUME_S = 60.0
"""Seconds for which a client tries to resume a stream whose connection broke."""
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 4 << 20),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 300),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),
)
T = TypeVar("T")


class HasAddress(Protocol):
    """A running server, for example `serving.Server`."""

    @property
    def address(self) -> str:
        """host:port of its gRPC surface."""
        ...


@dataclasses.dataclass(frozen=True)
class UnaryCall(Generic[T]):
    """A call with one response: the method of the stub, the request, and how to read the response."""

    method: Callable[..., Any]
    request: Any
    read: Callable[[Any], T]


@dataclasses.dataclass(frozen=True)
class _OpenChannel:
    channel: Any
    inference: inference_pb2_grpc.InferenceStub
    resilience: resilience_pb2_grpc.ResilienceStub


class ClientBase:
    """The connection to `target` (host:port, or a running server), and the calls as values.

    `module` is grpc or grpc.aio. The first call opens the connection, so that a client for asyncio can be made before
    its loop runs. A stream is resumed for up to `resume_s` seconds after its connection broke.
    """

    def __init__(self, target: str | HasAddress, module: Any, api_key: str | None, tls: ClientTls | None) -> None:
        self.resume_s = RESUME_S
        self.address = target if isinstance(target, str) else target.address
        self._metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        self._module = module
        self._tls = tls
        self._connection: _OpenChannel | None = None
        self._closed = False

    def _connected(self) -> "_OpenChannel":
        """The connection, opened if need be. Raises Unreachable once the client is closed."""
        if self._closed:
            raise Unreachable(f"this client of {self.address} is closed. Make another one.")
        if self._connection is None:
            if self._tls is None:
                channel = self._module.insecure_channel(self.address, options=CHANNEL_OPTIONS)
            else:
                channel = self._module.secure_channel(self.address, self._tls.grpc(), options=CHANNEL_OPTIONS)
            self._connection = _OpenChannel(
                channel, inference_pb2_grpc.InferenceStub(channel), resilience_pb2_grpc.ResilienceStub(channel)
            )
        return self._connection

    def _take_channel(self) -> Any:
        """The channel, to close it, as no call follows; None if none was opened."""
        connection, self._connection, self._closed = self._connection, None, True
        return None if connection is None else connection.channel

    @property
    def _inference(self) -> inference_pb2_grpc.InferenceStub:
        return self._connected().inference

    @property
    def _resilience(self) -> resilience_pb2_grpc.ResilienceStub:
        return self._connected().resilience

    def _generate_call(self, prompt: PromptLike, options: GenerateOptions) -> ResumableCall:
        request_id = options.get("request_id") or uuid.uuid4().hex
        message = request_to_proto(read_prompt(prompt), sampling_params(options), request_id)
        return ResumableCall(self._inference, message, options.get("timeout_s"), self._metadata, self.resume_s)

    def _abort_call(self, request_id: str) -> UnaryCall[bool]:
        request = inference_pb2.AbortRequest(request_id=request_id)
        return UnaryCall(self._inference.Abort, request, lambda response: response.aborted)

    def _tokenize_call(self, prompt: PromptLike) -> UnaryCall[tuple[int, ...]]:
        request = tokenize_to_proto(read_prompt(prompt))
        return UnaryCall(self._inference.Tokenize, request, lambda response: tuple(response.ids))

    def _detokenize_call(self, token_ids: Iterable[int]) -> UnaryCall[str]:
        request = tokens_to_proto(read_tokens(token_ids))
        return UnaryCall(self._inference.Detokenize, request, lambda response: response.text)

    def _model_call(self) -> UnaryCall[ModelInfo]:
        return UnaryCall(self._inference.GetModelInfo, inference_pb2.GetModelInfoRequest(), model_from_proto)

    def _status_call(self) -> UnaryCall[Status]:
        return UnaryCall(self._resilience.GetStatus, resilience_pb2.GetStatusRequest(), status_from_proto)

    def _watch_call(self, after: int, timeout_s: float | None) -> Any:
        request = resilience_pb2.WatchRequest(after=after)
        return self._resilience.Watch(request, timeout=timeout_s, metadata=self._metadata)

    def _kill_call(self, rank: int, signal: str, host: str) -> UnaryCall[None]:
        request = resilience_pb2.KillRequest(rank=rank, signal=signal, host=host)
        return UnaryCall(self._resilience.Kill, request, lambda _: None)

    def _what_if_call(self) -> UnaryCall[list[LossForecast]]:
        return UnaryCall(
            self._resilience.WhatIf,
            resilience_pb2.WhatIfRequest(),
            lambda response: [prospect_from_proto(each) for each in response.prospects],
        )

    def _plan_call(self) -> UnaryCall[str]:
        return UnaryCall(self._resilience.WhatIf, resilience_pb2.WhatIfRequest(), lambda response: response.plan)

    def _apply_call(self, instruction: Instruction) -> UnaryCall[list[int]]:
        request = instruction_to_proto(instruction)
        return UnaryCall(self._resilience.Apply, request, lambda response: list(response.serving))

    def _tensors_call(self, parts: TensorParts) -> UnaryCall[list[int]]:
        return UnaryCall(self._resilience.ApplyTensors, parts, lambda response: list(response.serving))

    def _report_call(self, rank: int, level: int, code: str, message: str) -> UnaryCall[str]:
        request = resilience_pb2.ReportRequest(rank=rank, level=level, code=code, message=message)
        return UnaryCall(self._resilience.Report, request, lambda response: response.action)
