"""Prometheus metrics: vLLM's names, so that its dashboards and autoscalers work, and moejax's own.

Gauges and counters of the backend are read when Prometheus asks; times of requests and recoveries are
observed as they happen.
"""

import re
from collections.abc import Callable, Iterator

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.status import Backend, Status

# Buckets in seconds, as vLLM has them.
_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_INTER_TOKEN = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_PHASE = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self, backend: Backend) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self._backend = backend
        model = {"model_name": backend.model.name}

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> prometheus_client.Histogram:
            made = prometheus_client.Histogram(name, text, list(model), buckets=buckets, registry=self.registry)
            return made.labels(**model)

        def counter(name: str, text: str) -> prometheus_client.Counter:
            return prometheus_client.Counter(name, text, list(model), registry=self.registry).labels(**model)

        self.first_token = histogram("vllm:time_to_first_token_seconds", "From request to first token.", _FIRST_TOKEN)
        self.inter_token = histogram("vllm:inter_token_latency_seconds", "Between two tokens.", _INTER_TOKEN)
        self.request = histogram("vllm:e2e_request_latency_seconds", "From request to last token.", _REQUEST)
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of requests that got a token.")
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens generated.")
        self._success = prometheus_client.Counter(
            "vllm:request_success",
            "Requests by how they ended.",
            ["finished_reason", *model],
            registry=self.registry,
        )
        self._recoveries = prometheus_client.Counter(
            "moejax_recoveries", "Recoveries by cause.", ["cause"], registry=self.registry
        )
        self._phases = prometheus_client.Histogram(
            "moejax_recovery_phase_seconds",
            "Recovery by phase.",
            ["phase"],
            buckets=_PHASE,
            registry=self.registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(finished_reason=reason, **model)
        self.registry.register(_StatusCollector(backend))

    def ended(self, reason: str) -> None:
        """Count a request that ended: stop, length, abort or error."""
        self._success.labels(finished_reason=reason, model_name=self._backend.model.name).inc()

    async def follow(self) -> None:
        """Count recoveries as the backend reports them, until cancelled."""
        async for event in self._backend.watch():
            if event.kind == "recovered":
                self._recoveries.labels(cause=_kind(event.cause)).inc()
                for phase, milliseconds in event.phases.items():
                    self._phases.labels(phase=phase).observe(milliseconds / 1e3)

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        return prometheus_client.generate_latest(self.registry)


def _kind(cause: str) -> str:
    """The kinds in "rank 1 exit: signal 9; rank 2 exit: signal 9": a label must have few values."""
    parts = (re.sub(r"^ *rank \d+ ", "", part).partition(":")[0].strip() for part in cause.split(";"))
    return "+".join(sorted({part for part in parts if part})) or "unknown"


class RequestTimer:
    """Observes one request: call `token` for each token and `finished` once."""

    def __init__(self, metrics: Metrics, prompt_tokens: int, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._prompt_tokens = prompt_tokens
        self._clock = clock
        self._started = clock()
        self._last: float | None = None

    def token(self) -> None:
        """A token came."""
        now = self._clock()
        if self._last is None:
            self._metrics.first_token.observe(now - self._started)
            self._metrics.prompt_tokens.inc(self._prompt_tokens)
        else:
            self._metrics.inter_token.observe(now - self._last)
        self._metrics.generation_tokens.inc()
        self._last = now

    def finished(self, reason: str) -> None:
        """The stream ended."""
        self._metrics.ended(reason)
        self._metrics.request.observe(self._clock() - self._started)


class _StatusCollector(Collector):
    """What `Status` says, at the moment of the scrape."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def describe(self) -> list[Metric]:
        return []  # names do not depend on the backend's state, so nothing has to be collected to register

    def collect(self) -> Iterator[Metric]:
        status, model = self._backend.status(), self._backend.model.name
        alive = [r for r in status.ranks if r.state == "serving"]
        pages, used = sum(r.pages for r in alive), sum(r.pages_used for r in alive)
        for name, text, value in (
            ("vllm:num_requests_running", "Requests with a place in the batch.", status.running),
            ("vllm:num_requests_waiting", "Requests in the queue.", status.waiting),
            ("vllm:kv_cache_usage_perc", "Cache pages in use, 1 is all.", used / pages if pages else 0.0),
        ):
            family = GaugeMetricFamily(name, text, labels=["model_name"])
            family.add_metric([model], value)
            yield family
        preemptions = CounterMetricFamily("vllm:num_preemptions", "Requests put back.", labels=["model_name"])
        preemptions.add_metric([model], status.preemptions)
        yield preemptions
        yield from _own(status, len(alive))


def _own(status: Status, alive: int) -> Iterator[Metric]:
    yield GaugeMetricFamily("moejax_epoch", "Epoch of the mesh; grows with each re-plan.", status.epoch)
    yield GaugeMetricFamily("moejax_ranks_alive", "Ranks that serve.", alive)
    yield GaugeMetricFamily("moejax_ranks", "Ranks the server was started with.", len(status.ranks))
    yield GaugeMetricFamily("moejax_ready", "1 while requests can be served.", status.ready)
    yield GaugeMetricFamily("moejax_masked_experts", "Experts without a loaded copy.", len(status.masked))
    yield CounterMetricFamily(
        "moejax_compiles_after_ready", "XLA compiles after warm-up; 0 is right.", status.compiles_after_ready
    )
    yield CounterMetricFamily("moejax_step_seconds", "Time spent on steps.", status.step_ms / 1e3)
    yield CounterMetricFamily("moejax_program_seconds", "Of it, inside the compiled programs.", status.program_ms / 1e3)
    coverage = GaugeMetricFamily("moejax_lattice_coverage", "Losses prepared for, 1 is all.", labels=["loss"])
    for loss, share in status.lattice.items():
        coverage.add_metric([loss], share)
    yield coverage
