"""Traces with OpenTelemetry's own exporter in memory, through both surfaces."""

import httpx
import pytest

from serving.auth.limits import CallLimits
from serving.core.request_processor import RequestProcessor
from serving.errors import StartError
from serving.observability.metrics import Metrics
from serving.observability.tracing import open_tracer
from simulation.byte_tokenizer import byte_tokenizer
from tests.support.fake_backend import FakeBackend

pytest.importorskip("opentelemetry.sdk", reason="needs moejax[otel]")

from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from serving.api.client import AsyncClient
from serving.api.grpc.server import start_grpc
from serving.api.http.server import start_http
from serving.config import Settings
from serving.observability.tracing_otel import OtlpTracer

pytestmark = pytest.mark.anyio

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


async def test_a_request_is_a_span_under_the_callers_trace(exporter):
    backend, tracer = FakeBackend(), OtlpTracer("", exporter)
    processor = RequestProcessor(backend, byte_tokenizer(), Metrics(backend, tracer))
    limits = CallLimits.of(Settings())
    http_server = await start_http(processor, limits=limits)
    rpc_server = await start_grpc(processor, limits=limits)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{http_server.port}") as client:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        await client.post("/v1/completions", json={"prompt": "ab", "max_tokens": 3}, headers=headers)
    async with AsyncClient(f"127.0.0.1:{rpc_server.port}") as caller:
        await caller.generate("a", max_tokens=1)
    await http_server.stop(0)
    await rpc_server.stop(0)
    tracer.close()
    first, second = exporter.get_finished_spans()
    assert f"{first.context.trace_id:032x}" == TRACE
    assert f"{first.parent.span_id:016x}" == PARENT
    assert first.attributes["gen_ai.usage.input_tokens"] == 2
    assert first.attributes["gen_ai.usage.output_tokens"] == 3
    assert first.attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert second.parent is None
    assert first.start_time < first.end_time


async def test_a_recovery_is_a_span_with_its_phases_one_after_the_other(exporter):
    backend, tracer = FakeBackend(), OtlpTracer("", exporter)
    metrics = Metrics(backend, tracer)
    await backend.lose(1)
    async for event in backend.watch():
        metrics.count_event(event)
        if event.kind == "recovered":
            break
    tracer.close()
    spans = {span.name: span for span in exporter.get_finished_spans()}
    whole = spans.pop("recovery")
    assert list(spans) == ["detect", "fence", "abort", "plan", "adopt", "resume"]
    assert {span.parent.span_id for span in spans.values()} == {whole.context.span_id}
    ends = [whole.start_time, *(span.end_time for span in spans.values())]
    assert [span.start_time for span in spans.values()] == ends[:-1]
    assert (whole.end_time - whole.start_time) / 1e6 == pytest.approx(68.5, abs=0.01)


def test_a_server_without_the_packages_says_what_to_install(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name}", name="opentelemetry")

    monkeypatch.setattr("serving.observability.tracing.importlib.import_module", missing)
    with pytest.raises(StartError, match=r"pip install -e '\.\[otel\]'"):
        open_tracer("http://127.0.0.1:4317")
