"""`vllm.grpc.engine.VllmEngine`, so that gateways made for vLLM route to this server (optional extra `vllm`).

Messages come from PyPI's `smg-grpc-proto`. What this server cannot do (media, transfer of caches, structural tags) is
refused by name; embeddings, profiles and cache events are UNIMPLEMENTED. Tokens go out, text is the gateway's.
"""

import asyncio
import contextlib
import datetime
import json
import time
from typing import Any

import grpc
from smg_grpc_proto import vllm_engine_pb2 as messages  # pyright: ignore[reportMissingImports]
from smg_grpc_proto import vllm_engine_pb2_grpc as stubs  # pyright: ignore[reportMissingImports]

from serving.errors import DeadlineExceeded, InvalidRequest
from serving.generation import Chunk, Complete, Generation, Prompt
from serving.request import Guide, SamplingParams
from serving.rpc_errors import statuses
from serving.version import version

NAME = messages.DESCRIPTOR.services_by_name["VllmEngine"].full_name
_REFUSED = ("mm_inputs", "media_refs", "kv_transfer_params", "kv_transfer_params_json", "data_parallel_rank")
_GUIDES = {"json_schema": "json", "regex": "regex", "grammar": "lark"}


def add(generation: Generation, server: grpc.aio.Server, slow_client_s: float) -> None:
    """Offer the service on `server`."""
    stubs.add_VllmEngineServicer_to_server(VllmEngine(generation, slow_client_s), server)


class VllmEngine(stubs.VllmEngineServicer):
    """The service over `Generation`."""

    def __init__(self, generation: Generation, slow_client_s: float) -> None:
        self._generation = generation
        self._slow_client_s = slow_client_s

    async def Generate(self, request: messages.GenerateRequest, context: Any) -> None:
        """Chunks as tokens come (when asked to stream), then one Complete with all of them, for each answer."""
        async with statuses(context):
            params = sampling_value(request.sampling_params)
            accepted = await self._generation.accept_all(
                [prompt_value(request)], params, request_id=request.request_id, timeout_s=context.time_remaining()
            )
            whole: dict[int, list[Chunk]] = {}
            prompt_tokens = len(accepted[0].prompt)
            wanted = request.sampling_params.HasField("logprobs")
            async with contextlib.aclosing(self._generation.streams(accepted, params.stop)) as items:
                async for item in items:
                    if isinstance(item, Complete):
                        chunks = whole.get(item.choice, [])
                        await self._write(context, complete=_complete(item, chunks, wanted))
                    elif isinstance(item, Chunk):
                        chunks = whole.setdefault(item.choice, [])
                        chunks.append(item)
                        if request.stream and item.token_ids:
                            await self._write(context, chunk=_chunk(item, chunks, prompt_tokens, wanted))

    async def _write(self, context: Any, **response: Any) -> None:
        try:
            async with asyncio.timeout(self._slow_client_s):
                await context.write(messages.GenerateResponse(**response))
        except TimeoutError:
            raise DeadlineExceeded(f"nothing was read for {self._slow_client_s:g} s.") from None

    async def Abort(self, request: messages.AbortRequest, context: Any) -> messages.AbortResponse:
        """Cancel requests by their ids; unknown ones are over already."""
        async with statuses(context):
            for request_id in request.request_ids:
                self._generation.abort(request_id)
            return messages.AbortResponse()

    async def HealthCheck(self, request: Any, context: Any) -> messages.HealthCheckResponse:
        """Whether a request can be served now."""
        async with statuses(context):
            status = self._generation.backend.status()
            healthy = status.ready and not status.draining
            return messages.HealthCheckResponse(healthy=healthy, message="" if healthy else "no capacity or draining")

    async def GetModelInfo(self, request: Any, context: Any) -> messages.GetModelInfoResponse:
        """The model, as far as a gateway needs it."""
        async with statuses(context):
            model = self._generation.backend.model
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

    async def GetServerInfo(self, request: Any, context: Any) -> messages.GetServerInfoResponse:
        """Age and size of the server."""
        async with statuses(context):
            status = self._generation.backend.status()
            return messages.GetServerInfoResponse(
                active_requests=status.running + status.waiting,
                uptime_seconds=max(0.0, time.time() - status.started_at),
                server_type="vllm-grpc",
                data_parallel_size=1,
                block_size=status.page_size,
            )

    async def GetLoads(self, request: Any, context: Any) -> messages.GetLoadsResponse:
        """How busy the server is, as one rank: which of its ranks serves a request is its own business."""
        async with statuses(context):
            status = self._generation.backend.status()
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


def prompt_value(request: messages.GenerateRequest) -> Prompt:
    """The prompt of a request. Raises InvalidRequest when there is none, or with what this server cannot do."""
    for name in _REFUSED:
        if request.HasField(name):
            raise InvalidRequest(f"{name} is not supported by this server.", param=name)
    kind = request.WhichOneof("input")
    if kind is None:
        raise InvalidRequest("the request has neither tokenized input nor text.", param="input")
    return tuple(request.tokenized.input_ids) if kind == "tokenized" else request.text


def sampling_value(message: messages.SamplingParams) -> SamplingParams:
    """Sampling in our terms. Zero is vLLM's default where zero makes no sense (top_p, repetition_penalty, n)."""
    for name in ("truncate_prompt_tokens", "prompt_logprobs"):
        if message.HasField(name):
            raise InvalidRequest(f"{name} is not supported by this server.", param=name)
    if message.include_stop_str_in_output:
        raise InvalidRequest("include_stop_str_in_output is not supported.", param="include_stop_str_in_output")
    return SamplingParams(
        n=message.n or 1,
        temperature=message.temperature if message.HasField("temperature") else 1.0,
        top_k=message.top_k,
        top_p=message.top_p or 1.0,
        min_p=message.min_p,
        seed=message.seed if message.HasField("seed") else None,
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        stop=tuple(message.stop),
        stop_tokens=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        min_tokens=message.min_tokens,
        frequency_penalty=message.frequency_penalty,
        presence_penalty=message.presence_penalty,
        repetition_penalty=message.repetition_penalty or 1.0,
        logit_bias=tuple(message.logit_bias.items()),
        top_logprobs=message.logprobs if message.HasField("logprobs") else 0,
        guide=_guide(message),
    )


def _guide(message: messages.SamplingParams) -> Guide | None:
    kind = message.WhichOneof("constraint")
    if kind is None or (kind == "json_object" and not message.json_object):
        return None
    if kind == "json_object":
        return Guide("json", '{"type": "object"}')
    if kind == "choice":
        return Guide("choice", json.dumps(list(message.choice.choices)))
    if kind not in _GUIDES:
        raise InvalidRequest(f"{kind} is not supported; send json_schema, regex, grammar or choice.", param=kind)
    return Guide(_GUIDES[kind], getattr(message, kind))  # pyright: ignore[reportArgumentType]


def _chunk(item: Chunk, so_far: list[Chunk], prompt_tokens: int, logprobs: bool) -> messages.GenerateStreamChunk:
    return messages.GenerateStreamChunk(
        token_ids=item.token_ids,
        prompt_tokens=prompt_tokens,
        completion_tokens=sum(len(chunk.token_ids) for chunk in so_far),
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
