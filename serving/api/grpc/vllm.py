"""The service vllm.grpc.engine.VllmEngine, so that gateways made for vLLM can route to this server (extra `vllm`).

The messages come from the package `smg-grpc-proto`. Fields that ask for something this server cannot do (media, KV
transfer, structural tags) are refused by name; embeddings, profiles and cache events are UNIMPLEMENTED. The service
returns token ids; the gateway makes the text, with the tokenizer that GetTokenizer sends.
"""

import asyncio
import contextlib
import datetime
import hashlib
import json
import time
from typing import Any

import grpc
from smg_grpc_proto import vllm_engine_pb2 as messages  # pyright: ignore[reportMissingImports]
from smg_grpc_proto import vllm_engine_pb2_grpc as stubs  # pyright: ignore[reportMissingImports]
from smg_grpc_proto.generated import common_pb2 as common  # pyright: ignore[reportMissingImports]

from serving.api.grpc.errors import abort_on_error
from serving.api.grpc.inference_messages import VLLM_NAMES
from serving.api.grpc.writing import write
from serving.core.answers import Chunk, Complete
from serving.core.prompts import Prompt
from serving.core.request_processor import RequestProcessor
from serving.errors import InvalidRequest
from serving.protocol.backend import answered
from serving.protocol.sampling import SamplingParams, StructuredOutputs
from serving.text.tokenizer_archive import tokenizer_archive
from serving.version import version

_SERVICE = messages.DESCRIPTOR.services_by_name["VllmEngine"]
SERVICE_NAME = _SERVICE.full_name
_REFUSED = ("mm_inputs", "media_refs", "kv_transfer_params", "kv_transfer_params_json", "data_parallel_rank")
_TOKENIZER_CHUNK = 1 << 16
_GUIDES = {"json_schema": "json", "regex": "regex", "grammar": "lark"}


def add_vllm_service(processor: RequestProcessor, server: grpc.aio.Server, slow_client_s: float) -> None:
    """Add the service to `server`."""
    stubs.add_VllmEngineServicer_to_server(VllmEngine(processor, slow_client_s), server)


class VllmEngine(stubs.VllmEngineServicer):
    """The service over `RequestProcessor`."""

    def __init__(self, processor: RequestProcessor, slow_client_s: float) -> None:
        self._processor = processor
        self._slow_client_s = slow_client_s

    async def Generate(self, request: messages.GenerateRequest, context: Any) -> None:
        """For each choice: chunks as tokens come if the request asks to stream, then one Complete with all tokens."""
        async with abort_on_error(context):
            params = sampling_from_proto(request.sampling_params)
            accepted = await self._processor.accept_all(
                [prompt_from_proto(request)],
                params,
                request_id=request.request_id,
                timeout_s=context.time_remaining(),
                names=VLLM_NAMES,
            )
            chunks_by_choice: dict[int, list[Chunk]] = {}
            tokens_by_choice: dict[int, int] = {}
            prompt_tokens = len(accepted[0].prompt)
            with_logprobs = request.sampling_params.HasField("logprobs")
            async with contextlib.aclosing(self._processor.stream_call(accepted, params.stop)) as items:
                async for item in items:
                    if isinstance(item, Complete):
                        chunks = chunks_by_choice.get(item.choice, [])
                        await self._write(context, complete=_complete(item, chunks, with_logprobs))
                    elif isinstance(item, Chunk):
                        chunks = chunks_by_choice.setdefault(item.choice, [])
                        chunks.append(item)
                        so_far = tokens_by_choice.get(item.choice, 0) + len(item.token_ids)
                        tokens_by_choice[item.choice] = so_far
                        if request.stream and item.token_ids:
                            await self._write(context, chunk=_chunk(item, so_far, prompt_tokens, with_logprobs))

    async def _write(self, context: Any, **response: Any) -> None:
        await write(context, messages.GenerateResponse(**response), self._slow_client_s)

    async def Abort(self, request: messages.AbortRequest, context: Any) -> messages.AbortResponse:
        """Cancel requests by their ids. An unknown id is no error: its request has ended."""
        async with abort_on_error(context):
            for request_id in request.request_ids:
                await self._processor.abort(request_id)
            return messages.AbortResponse()

    async def HealthCheck(self, request: Any, context: Any) -> messages.HealthCheckResponse:
        """True when a request can be served now."""
        async with abort_on_error(context):
            status = await answered(self._processor.backend.status())
            healthy = status.ready and not status.draining
            return messages.HealthCheckResponse(healthy=healthy, message="" if healthy else "no capacity or draining")

    async def GetModelInfo(self, request: Any, context: Any) -> messages.GetModelInfoResponse:
        """The properties of the model that a gateway needs."""
        async with abort_on_error(context):
            model = self._processor.backend.model
            return messages.GetModelInfoResponse(
                model_path=model.name,
                served_model_name=model.name,
                is_generation=True,
                max_context_length=model.max_context,
                max_req_input_len=model.max_context - 1,
                vocab_size=model.vocab_size,
                eos_token_ids=model.stop_tokens,
                bos_token_id=model.bos_token or 0,
            )

    async def GetTokenizer(self, request: Any, context: Any) -> None:
        """The tokenizer's files in a ZIP archive, in chunks; the last one has the archive's digest."""
        async with abort_on_error(context):
            data = await asyncio.to_thread(tokenizer_archive, self._processor.tokenizer)
            digest = hashlib.sha256(data).hexdigest()
            for start in range(0, len(data), _TOKENIZER_CHUNK):
                last = start + _TOKENIZER_CHUNK >= len(data)
                part = data[start : start + _TOKENIZER_CHUNK]
                chunk = common.GetTokenizerChunk(data=part, sha256=digest if last else "")
                await write(context, chunk, self._slow_client_s)

    async def GetServerInfo(self, request: Any, context: Any) -> messages.GetServerInfoResponse:
        """Uptime and number of requests."""
        async with abort_on_error(context):
            status = await answered(self._processor.backend.status())
            return messages.GetServerInfoResponse(
                active_requests=status.running + status.waiting,
                uptime_seconds=max(0.0, time.time() - status.started_at),
                server_type="vllm-grpc",
                data_parallel_size=1,
                block_size=status.page_size,
            )

    async def GetLoads(self, request: Any, context: Any) -> messages.GetLoadsResponse:
        """The load of the server as one data-parallel rank: the server itself assigns requests to its ranks."""
        async with abort_on_error(context):
            status = await answered(self._processor.backend.status())
            pages, used = (sum(getattr(r, name) for r in status.ranks) for name in ("pages", "pages_used"))
            load = messages.SchedulerLoad(
                num_running_reqs=status.running,
                num_waiting_reqs=status.waiting,
                num_total_reqs=status.running + status.waiting,
                num_used_tokens=used * status.page_size,
                max_total_num_tokens=pages * status.page_size,
                token_usage=used / pages if pages else 0.0,
                cache_hit_rate=status.prefix_hits / status.prefix_queries if status.prefix_queries else 0.0,
            )
            now = datetime.datetime.now(datetime.UTC).isoformat()
            return messages.GetLoadsResponse(timestamp=now, version=version(), dp_rank_count=1, loads=[load])


async def _unimplemented(_service: VllmEngine, _request: Any, context: Any) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this server does not have this method.")


for _method in _SERVICE.methods:  # the methods of the generated class log a traceback for each call
    if _method.name not in vars(VllmEngine):
        setattr(VllmEngine, _method.name, _unimplemented)


def prompt_from_proto(request: messages.GenerateRequest) -> Prompt:
    """The prompt of a request. Raises InvalidRequest when it has none, or has a field that is not supported."""
    for name in _REFUSED:
        if request.HasField(name):
            raise InvalidRequest(f"{name} is not supported by this server.", param=name)
    kind = request.WhichOneof("input")
    if kind is None:
        raise InvalidRequest("the request has neither tokenized input nor text.", param="input")
    return tuple(request.tokenized.input_ids) if kind == "tokenized" else request.text


def sampling_from_proto(message: messages.SamplingParams) -> SamplingParams:
    """Sampling parameters. 0 means the default for top_p, top_k, min_p, repetition_penalty and n."""
    for name in ("truncate_prompt_tokens", "prompt_logprobs"):
        if message.HasField(name):
            raise InvalidRequest(f"{name} is not supported by this server.", param=name)
    if message.include_stop_str_in_output:
        raise InvalidRequest("include_stop_str_in_output is not supported.", param="include_stop_str_in_output")
    return SamplingParams(
        n=message.n or 1,
        temperature=message.temperature if message.HasField("temperature") else None,
        top_k=message.top_k or None,
        top_p=message.top_p or None,
        min_p=message.min_p or None,
        seed=message.seed if message.HasField("seed") else None,
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        stop=tuple(message.stop),
        stop_tokens=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        min_tokens=message.min_tokens,
        frequency_penalty=message.frequency_penalty,
        presence_penalty=message.presence_penalty,
        repetition_penalty=message.repetition_penalty or None,
        logit_bias=tuple(message.logit_bias.items()),
        top_logprobs=message.logprobs if message.HasField("logprobs") else 0,
        structured_outputs=_guide(message),
    )


def _guide(message: messages.SamplingParams) -> StructuredOutputs | None:
    kind = message.WhichOneof("constraint")
    if kind is None or (kind == "json_object" and not message.json_object):
        return None
    if kind == "json_object":
        return StructuredOutputs("json", '{"type": "object"}', param=kind)
    if kind == "choice":
        return StructuredOutputs("choice", json.dumps(list(message.choice.choices)), param=kind)
    if kind not in _GUIDES:
        raise InvalidRequest(f"{kind} is not supported; send json_schema, regex, grammar or choice.", param=kind)
    text = getattr(message, kind)
    return StructuredOutputs(_GUIDES[kind], text, param=kind)  # pyright: ignore[reportArgumentType]


def _chunk(item: Chunk, completion_tokens: int, prompt_tokens: int, logprobs: bool) -> messages.GenerateStreamChunk:
    return messages.GenerateStreamChunk(
        token_ids=item.token_ids,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        output_logprobs=_logprobs([item]) if logprobs else None,
        index=item.choice,
    )


def _complete(item: Complete, chunks: list[Chunk], logprobs: bool) -> messages.GenerateComplete:
    matched: dict[str, Any] = {}
    if item.matched is not None:
        matched["matched_stop_str" if isinstance(item.matched, str) else "matched_token_id"] = item.matched
    return messages.GenerateComplete(
        output_ids=[token for chunk in chunks for token in chunk.token_ids],
        finish_reason=item.reason,
        prompt_tokens=item.prompt_tokens,
        completion_tokens=item.completion_tokens,
        cached_tokens=item.cached_tokens,
        output_logprobs=_logprobs(chunks) if logprobs else None,
        index=item.choice,
        **matched,
    )


def _logprobs(chunks: list[Chunk]) -> messages.OutputLogProbs:
    return messages.OutputLogProbs(
        token_logprobs=[value for chunk in chunks for value in chunk.logprobs],
        token_ids=[token for chunk in chunks for token in chunk.token_ids],
        top_logprobs=[
            messages.TopLogProbs(values=[p for _, p in top], token_ids=[t for t, _ in top])
            for chunk in chunks
            for top in chunk.top
        ],
    )
