"""The names of all samples that a server exports once it has served a request and recovered from a loss."""

from prometheus_client.parser import text_string_to_metric_families

from serving.core.request_processor import RequestProcessor
from serving.observability.metrics import Metrics
from serving.protocol.sampling import SamplingParams
from simulation.byte_tokenizer import byte_tokenizer
from tests.support.fake_backend import FakeBackend


async def exported_samples() -> set[str]:
    """The names, as a query has them."""
    backend = FakeBackend()
    metrics = Metrics(backend)
    processor = RequestProcessor(backend, byte_tokenizer(), metrics)
    _ = [item async for item in processor.stream(await processor.accept("a", SamplingParams(max_tokens=2)))]
    await backend.lose(1)
    metrics.count_event(backend._events[-1])
    text = metrics.render(backend.status()).decode()
    return {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
