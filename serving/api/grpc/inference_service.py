"""The service moejax.v1.Inference: streams of text, tokens and what the model is."""

import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from serving.api.grpc import inference_messages as messages
from serving.api.grpc.errors import abort_on_error
from serving.api.grpc.writing import write
from serving.core.answers import AnswerItem
from serving.core.request_processor import RequestProcessor
from serving.proto.moejax.v1 import inference_pb2, inference_pb2_grpc
from serving.protocol.backend import answered
from serving.text.validation import check_tokens
from serving.version import version

SERVICE_NAME = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """The service over `RequestProcessor`. A client that reads nothing for `slow_client_s` seconds ends its request."""

    def __init__(self, processor: RequestProcessor, slow_client_s: float) -> None:
        self._processor = processor
        self._slow_client_s = slow_client_s

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Any) -> None:
        """Stream one request. The deadline of the call is the deadline of the request."""
        async with abort_on_error(context):
            params, prompt = messages.sampling_from_proto(request.sampling), messages.prompt_from_proto(request)
            if (guide := messages.tool_choice_constraint(request)) is not None:
                params = dataclasses.replace(params, structured_outputs=guide)
            accepted = await self._processor.accept_all(
                [prompt],
                params,
                request_id=request.request_id,
                timeout_s=context.time_remaining(),
                names=messages.NAMES,
            )
            await self._send(self._processor.stream_call(accepted, params.stop, form={}), context, ())

    async def Resume(self, request: inference_pb2.ResumeRequest, context: Any) -> None:
        """Stream the part of an earlier call that its caller has not received."""
        async with abort_on_error(context):
            call = await self._processor.find_call(request.request_id)
            await self._send(self._processor.replay(call), context, request.after)

    async def _send(self, stream: AsyncGenerator[AnswerItem, None], context: Any, after: Sequence[int]) -> None:
        """Write the items of a stream, except the first `after[choice]` of each choice, which the caller has."""
        sequences: dict[int, int] = {}
        async with contextlib.aclosing(stream) as items:
            async for item in items:
                sequence = sequences[item.choice] = sequences.get(item.choice, 0) + 1
                if item.choice < len(after) and sequence <= after[item.choice]:
                    continue
                message = messages.response_to_proto(item)
                message.sequence = sequence
                await write(context, message, self._slow_client_s)

    async def Abort(self, request: inference_pb2.AbortRequest, context: Any) -> inference_pb2.AbortResponse:
        """Cancel a request by its id."""
        async with abort_on_error(context):
            return inference_pb2.AbortResponse(aborted=await self._processor.abort(request.request_id))

    async def Tokenize(self, request: inference_pb2.TokenizeRequest, context: Any) -> inference_pb2.TokenIds:
        """The tokens of a prompt."""
        async with abort_on_error(context):
            return inference_pb2.TokenIds(ids=await self._processor.tokenize(messages.prompt_from_proto(request)))

    async def Detokenize(self, request: inference_pb2.TokenIds, context: Any) -> inference_pb2.DetokenizeResponse:
        """The text of token ids."""
        async with abort_on_error(context):
            check_tokens(tuple(request.ids), self._processor.backend.model.vocab_size, "ids")
            return inference_pb2.DetokenizeResponse(text=self._processor.tokenizer.decode(tuple(request.ids)))

    async def GetModelInfo(self, request: Any, context: Any) -> inference_pb2.ModelInfo:
        """The model being served."""
        async with abort_on_error(context):
            return messages.model_to_proto(self._processor.model)

    async def GetServerInfo(self, request: Any, context: Any) -> inference_pb2.ServerInfo:
        """Version, uptime and number of ranks."""
        async with abort_on_error(context):
            status = await answered(self._processor.backend.status())
            return inference_pb2.ServerInfo(
                version=version(),
                started_at=status.started_at,
                uptime_s=max(0.0, time.time() - status.started_at),
                ready=status.ready,
                chaos=status.chaos,
                epoch=status.epoch,
                ranks_alive=sum(r.state == "serving" for r in status.ranks),
                ranks_total=len(status.ranks),
                weights_version=status.weights_version,
            )
