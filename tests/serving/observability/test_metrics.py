"""The exported metrics: vLLM's names, and counts that can be worked out by hand."""

import asyncio
import dataclasses

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.core.request_processor import RequestProcessor
from serving.observability.metrics import Metrics
from serving.protocol.sampling import SamplingParams
from simulation.byte_tokenizer import byte_tokenizer
from tests.support.fake_backend import FakeBackend, model_named
from tests.support.fake_server import serve
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

LABEL = {"model_name": "fake"}


class Clock:
    """A clock that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


async def test_a_request_is_measured_from_its_start(backend):
    clock, metrics = Clock(), Metrics(backend)
    processor = RequestProcessor(backend, byte_tokenizer(), metrics, clock=clock)
    request = await processor.accept("ab", SamplingParams(max_tokens=3))
    backend.first_steps[request.id] = clock.now + 0.2
    ticks = iter([0.5, 0.02, 0.04, 0.0])
    played = backend.answer

    def answer(request, index):
        clock.now += next(ticks)
        return played(request, index)

    backend.answer = answer
    _ = [item async for item in processor.stream(request)]
    assert value(metrics, "vllm:time_to_first_token_seconds_sum", **LABEL) == pytest.approx(0.5)
    assert value(metrics, "vllm:inter_token_latency_seconds_count", **LABEL) == 2
    assert value(metrics, "vllm:inter_token_latency_seconds_sum", **LABEL) == pytest.approx(0.06)
    assert value(metrics, "vllm:e2e_request_latency_seconds_sum", **LABEL) == pytest.approx(0.56)
    parts = {"queue": 0.2, "prefill": 0.3, "decode": 0.06, "inference": 0.36}
    found = {part: value(metrics, f"vllm:request_{part}_time_seconds_sum", **LABEL) for part in parts}
    assert found == pytest.approx(parts)
    assert value(metrics, "vllm:prompt_tokens_total", **LABEL) == 2
    assert value(metrics, "vllm:generation_tokens_total", **LABEL) == 3
    assert value(metrics, "vllm:request_success_total", finished_reason="length", **LABEL) == 1
    assert value(metrics, "vllm:request_success_total", finished_reason="stop", **LABEL) == 0


async def test_a_call_is_measured_by_its_longest_answer(processor, backend):
    backend.reply = list(b"abcd")
    requests = await processor.accept_all(["a", "b"], SamplingParams(max_tokens=4))
    requests[1] = dataclasses.replace(requests[1], sampling=dataclasses.replace(requests[1].sampling, max_tokens=2))
    _ = [item async for item in processor.stream_call(requests)]
    assert value(processor.metrics, "vllm:request_max_num_generation_tokens_sum", **LABEL) == 4
    assert value(processor.metrics, "vllm:request_max_num_generation_tokens_count", **LABEL) == 1
    assert value(processor.metrics, "vllm:request_params_max_tokens_sum", **LABEL) == 4


async def test_a_request_that_was_left_counts_as_aborted(processor, backend):
    request = await processor.accept("a", SamplingParams())
    items = processor.stream(request)
    await anext(items)
    await items.aclose()
    assert value(processor.metrics, "vllm:request_success_total", finished_reason="abort", **LABEL) == 1


async def test_gauges_are_those_of_the_moment(backend):
    metrics = Metrics(backend)
    assert value(metrics, "moejax_ranks_alive") == 4
    assert value(metrics, "vllm:kv_cache_usage_perc", **LABEL) == pytest.approx((0 + 8 + 16 + 24) / 256)
    await backend.lose(3)
    assert value(metrics, "moejax_ranks_alive") == 3
    assert value(metrics, "moejax_epoch") == 1
    assert value(metrics, "moejax_masked_experts") == 1
    assert value(metrics, "moejax_lattice_coverage", loss="2 ranks") == 0.5
    assert value(metrics, "vllm:num_preemptions_total", **LABEL) == 3
    assert value(metrics, "moejax_compiles_after_ready_total") == 0


async def test_recoveries_are_counted_by_kind_of_cause_and_timed_by_phase(backend):
    metrics = Metrics(backend)
    following = asyncio.create_task(metrics.follow())
    await backend.lose(1, "rank 1 exit: signal 9; rank 2 exit: signal 9")
    await backend.lose(2, "hang: no heartbeat for 0.4 s")
    await until(lambda: value(metrics, "moejax_recoveries_total", cause="hang", outcome="resumed"))
    following.cancel()
    assert value(metrics, "moejax_recoveries_total", cause="exit", outcome="resumed") == 1
    assert value(metrics, "moejax_recoveries_total", cause="hang", outcome="resumed") == 1
    assert value(metrics, "moejax_recovery_phase_seconds_sum", phase="adopt") == pytest.approx(0.076)


async def test_recoveries_are_counted_by_outcome(backend):
    metrics = Metrics(backend)
    following = asyncio.create_task(metrics.follow())
    await backend.emit("recovered", cause="rank 1 step: late", phases={"join": 300.0, "adopt": 5.0})
    await backend.emit("no_capacity", cause="rank 0 exit: signal 9", message="nobody")
    await backend.emit("rejoined", rank=0)
    await backend.emit("starved", rank=0, cause="no heartbeat for 0.7 s")
    await backend.emit("rejoin_failed")
    await until(lambda: value(metrics, "moejax_rejoins_total", outcome="failed"))
    following.cancel()
    assert value(metrics, "moejax_recoveries_total", cause="step", outcome="regenerated") == 1
    assert value(metrics, "moejax_recoveries_total", cause="exit", outcome="no_capacity") == 1
    assert value(metrics, "moejax_rejoins_total", outcome="joined") == 1
    assert value(metrics, "moejax_rejoins_total", outcome="failed") == 1
    assert value(metrics, "moejax_ranks_starved_total") == 1


async def test_load_of_experts_and_price_of_ranks_are_those_of_the_status(processor, backend):
    request = await processor.accept("a", SamplingParams(max_tokens=5))
    _ = [item async for item in processor.stream(request)]
    metrics = processor.metrics
    assert value(metrics, "moejax_expert_tokens_total", layer="1", expert="2") == 2 * 3 * 5
    assert value(metrics, "moejax_expert_imbalance", layer="1") == pytest.approx(8 / 4.5)
    assert value(metrics, "moejax_rank_loss_stall_seconds", rank="2") == pytest.approx(0.082)
    assert value(metrics, "moejax_rank_up", rank="0") == 1
    assert (value(metrics, "moejax_rows_total"), value(metrics, "moejax_rows_filled_total")) == (40 * 5, 10 * 5)
    await backend.lose(0)
    assert value(metrics, "moejax_rank_up", rank="0") == 0
    assert value(metrics, "moejax_rank_loss_stall_seconds", rank="0") is None
    assert value(metrics, "moejax_experts_loaded_total") == 4
    assert value(metrics, "moejax_experts_rebuilt_total") == 3
    assert value(metrics, "moejax_parity_bytes") == 5 << 20
    assert value(metrics, "moejax_parity_coverage") == 7 / 8
    assert value(metrics, "moejax_protected_bytes") == 1 << 20
    assert value(metrics, "moejax_tokens_restored_total") == 510
    assert value(metrics, "moejax_tokens_recomputed_total") == 2
    assert value(metrics, "vllm:cache_config_info", block_size="16", num_gpu_blocks="192", cache_dtype="float32") == 1


async def test_a_large_model_exports_only_the_imbalance_of_layers():
    model = dataclasses.replace(model_named("large"), experts=256, moe_layers=58)
    backend = FakeBackend(model=model)
    metrics = Metrics(backend)
    assert value(metrics, "moejax_expert_imbalance", layer="57") == 1.0
    assert value(metrics, "moejax_expert_tokens_total", layer="0", expert="0") is None
    assert len(metrics.render(backend.status())) < 100_000


VLLM_NAMES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:prompt_tokens",
    "vllm:generation_tokens",
    "vllm:request_success",
    "vllm:num_preemptions",
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "vllm:cache_config_info",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
}


async def test_a_prometheus_parser_reads_every_name():
    backend = FakeBackend()
    async with serve(backend) as server, httpx.AsyncClient(base_url=server.url) as client:
        await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
        await backend.lose(0)
        answer = await client.get("/metrics")
    families = {f.name: f for f in text_string_to_metric_families(answer.text)}
    assert families.keys() >= VLLM_NAMES | {"moejax_epoch", "moejax_ranks_alive", "moejax_recoveries"}
    assert families["moejax_recoveries"].samples[0].value == 1
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
