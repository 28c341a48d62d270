"""Prometheus metrics: vLLM's names, so that its dashboards and autoscalers work, and moejax's own.

`serving.observability.status_metrics` reads the server's status at each scrape. Here are the metrics that are observed
as they happen: times of requests, tokens and recoveries.
"""

import os
import re
import time
from collections.abc import Callable

import prometheus_client
from prometheus_client import multiprocess

from serving.auth.api_keys import CALLER
from serving.observability.logs import REQUESTS
from serving.observability.metrics_folder import FOLDER
from serving.observability.status_metrics import StatusCollector
from serving.observability.tracing import TRACEPARENT, Tracer
from serving.protocol.backend import Backend
from serving.protocol.events import Event
from serving.protocol.request import Request
from serving.protocol.status import Status

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
_TOKENS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5)
_PHASE = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """All metrics of one server, in a registry of their own. Where FOLDER is set, edges and the front write theirs to
    one folder: each shows the sum, and only the front counts events. `beside_front` False: for an edge on another
    host, which counts its own requests alone."""

    def __init__(self, backend: Backend, tracer: Tracer | None = None, *, beside_front: bool = True) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self.folder = os.environ.get(FOLDER) if beside_front else None
        self.counts_events = beside_front and self.folder is None
        """Whether whoever serves these metrics has `follow` count events: with a folder, the front does."""
        self.tracer = tracer
        self._backend = backend
        self.model_name = backend.model.name
        model = {"model_name": backend.model.name}

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> prometheus_client.Histogram:
            made = prometheus_client.Histogram(name, text, list(model), buckets=buckets, registry=self.registry)
            return made.labels(**model)

        def counter(name: str, text: str) -> prometheus_client.Counter:
            return prometheus_client.Counter(name, text, list(model), registry=self.registry).labels(**model)

        self.first_token = histogram(
            "vllm:time_to_first_token_seconds", "Seconds from the start of a request to its first token.", _FIRST_TOKEN
        )
        self.inter_token = histogram(
            "vllm:inter_token_latency_seconds", "Seconds between two tokens of a request.", _INTER_TOKEN
        )
        self.request = histogram(
            "vllm:e2e_request_latency_seconds", "Seconds from the start of a request to its end.", _REQUEST
        )
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of requests that have got a token.")
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens generated.")
        self.prompt_length = histogram("vllm:request_prompt_tokens", "Number of prompt tokens of a request.", _TOKENS)
        self.output_length = histogram(
            "vllm:request_generation_tokens", "Number of tokens generated for a request.", _TOKENS
        )
        self.queue_time = histogram(
            "vllm:request_queue_time_seconds", "Seconds from the start of a request to its first step.", _REQUEST
        )
        self.prefill_time = histogram(
            "vllm:request_prefill_time_seconds",
            "Seconds from the first step of a request to its first token.",
            _REQUEST,
        )
        self.decode_time = histogram(
            "vllm:request_decode_time_seconds", "Seconds from the first token of a request to its last.", _REQUEST
        )
        self.inference_time = histogram(
            "vllm:request_inference_time_seconds",
            "Seconds from the first step of a request to its last token.",
            _REQUEST,
        )
        self.max_output_length = histogram(
            "vllm:request_max_num_generation_tokens", "Number of tokens of the longest answer of a call.", _TOKENS
        )
        self.max_tokens = histogram(
            "vllm:request_params_max_tokens", "Number of tokens that a call allows each answer.", _TOKENS
        )
        self._success = prometheus_client.Counter(
            "vllm:request_success",
            "Requests that ended, by how.",
            ["finished_reason", *model],
            registry=self.registry,
        )
        self._recoveries = prometheus_client.Counter(
            "moejax_recoveries",
            "Recoveries by cause and outcome: resumed (on a prepared mesh), regenerated, or no_capacity.",
            ["cause", "outcome"],
            registry=self.registry,
        )
        self._rejoins = prometheus_client.Counter(
            "moejax_rejoins", "Attempts of lost ranks to rejoin, by outcome.", ["outcome"], registry=self.registry
        )
        self._starved = prometheus_client.Counter(
            "moejax_ranks_starved",
            "Reports that a rank was late because its process waited for a processor.",
            registry=self.registry,
        )
        self._phases = prometheus_client.Histogram(
            "moejax_recovery_phase_seconds",
            "Seconds of a recovery, by phase.",
            ["phase"],
            buckets=_PHASE,
            registry=self.registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(finished_reason=reason, **model)
        for outcome in ("joined", "failed"):
            self._rejoins.labels(outcome=outcome)
        self._status = StatusCollector(backend)
        self.registry.register(self._status)

    def ended(self, reason: str) -> None:
        """Count a request that ended: stop, length, abort or error."""
        self._success.labels(finished_reason=reason, model_name=self.model_name).inc()

    async def follow(self) -> None:
        """Count recoveries and rejoins as the backend reports them, until cancelled."""
        async for event in self._backend.watch():
            self.count_event(event)

    def count_event(self, event: Event) -> None:
        """Count an event, and trace it if it is a recovery. Ignores events that no metric is made of."""
        if event.kind == "recovered":
            outcome = "regenerated" if "join" in event.phases else "resumed"
            self._recoveries.labels(cause=_cause_label(event.cause), outcome=outcome).inc()
            for phase, milliseconds in event.phases.items():
                self._phases.labels(phase=phase).observe(milliseconds / 1e3)
            if self.tracer is not None:
                phases = {name: ms for name, ms in event.phases.items() if name != "total"}
                self.tracer.phases("recovery", event.time, phases, {"epoch": event.epoch, "cause": event.cause})
        elif event.kind == "no_capacity":
            self._recoveries.labels(cause=_cause_label(event.cause), outcome="no_capacity").inc()
        elif event.kind in ("rejoined", "rejoin_failed"):
            self._rejoins.labels(outcome="joined" if event.kind == "rejoined" else "failed").inc()
        elif event.kind == "starved":
            self._starved.inc()

    def render(self, status: Status) -> bytes:
        """All metrics in Prometheus' text format, with those of this status."""
        self._status.status = status
        try:
            if self.folder is None:
                return prometheus_client.generate_latest(self.registry)
            registry = prometheus_client.CollectorRegistry()
            multiprocess.MultiProcessCollector(registry, self.folder)
            registry.register(self._status)
            return prometheus_client.generate_latest(registry)
        finally:
            self._status.status = None


def _cause_label(cause: str) -> str:
    """The kinds of loss in a cause: "exit" for "rank 1 exit: signal 9; rank 2 exit: signal 9". A label must have few
    values."""
    parts = (re.sub(r"^ *rank \d+ ", "", part).partition(":")[0].strip() for part in cause.split(";"))
    return "+".join(sorted({part for part in parts if part})) or "unknown"


class RequestTimer:
    """Times one request: its owner calls `token` for each token, and `finished` once. `first_step_at` says when it left
    the queue, by the same clock."""

    def __init__(
        self,
        metrics: Metrics,
        request: Request,
        clock: Callable[[], float],
        first_step_at: Callable[[str], float | None] = lambda _: None,
    ) -> None:
        self._metrics = metrics
        self._request = request
        self._clock = clock
        self._first_step_at = first_step_at
        self._started = clock()
        self._first: float | None = None
        self._first_step: float | None = None
        self._last = self._started
        self._tokens = 0
        self._epochs: list[int] = []

    def token(self, epoch: int) -> None:
        """Observe a token that was computed in this epoch."""
        now, self._tokens = self._clock(), self._tokens + 1
        if self._first is None:
            self._first, self._first_step = now, self._first_step_at(self._request.id)
            self._metrics.first_token.observe(now - self._started)
            self._metrics.prompt_tokens.inc(len(self._request.prompt))
        else:
            self._metrics.inter_token.observe(now - self._last)
        if epoch not in self._epochs:
            self._epochs.append(epoch)
        self._metrics.generation_tokens.inc()
        self._last = now

    def finished(self, reason: str) -> None:
        """Observe the end of the request: stop, length, abort or error."""
        took = self._clock() - self._started
        self._metrics.ended(reason)
        self._metrics.request.observe(took)
        self._metrics.prompt_length.observe(len(self._request.prompt))
        self._metrics.output_length.observe(self._tokens)
        if self._first is not None:
            scheduled = self._started if self._first_step is None else self._first_step
            self._metrics.queue_time.observe(max(0.0, scheduled - self._started))
            self._metrics.prefill_time.observe(max(0.0, self._first - scheduled))
            self._metrics.decode_time.observe(self._last - self._first)
            self._metrics.inference_time.observe(max(0.0, self._last - scheduled))
        first = None if self._first is None else self._first - self._started
        fields = {
            "request_id": self._request.id,
            "caller": CALLER.get(),
            "reason": reason,
            "prompt_tokens": len(self._request.prompt),
            "completion_tokens": self._tokens,
            "first_token_s": first,
            "seconds": took,
            "epochs": self._epochs,
        }
        REQUESTS.debug(
            "request %s: %s after %d tokens", self._request.id, reason, self._tokens, extra={"fields": fields}
        )
        if self._metrics.tracer is not None:
            self._trace(took, first, reason)

    def _trace(self, took: float, first: float | None, reason: str) -> None:
        """Send the span of the request. Attributes are named as in OpenTelemetry's conventions for generative models,
        and as in vLLM."""
        assert self._metrics.tracer is not None
        request, now = self._request, time.time()
        attributes = {
            "gen_ai.request.id": request.id,
            "gen_ai.request.model": self._metrics.model_name,
            "gen_ai.request.sampling.max_tokens": request.sampling.max_tokens,
            "gen_ai.request.sampling.temperature": request.sampling.temperature,
            "gen_ai.request.sampling.top_p": request.sampling.top_p,
            "gen_ai.response.finish_reasons": [reason],
            "gen_ai.usage.input_tokens": len(request.prompt),
            "gen_ai.usage.output_tokens": self._tokens,
            "gen_ai.latency.e2e": took,
            "moejax.epochs": self._epochs,
        }
        if first is not None:
            attributes["gen_ai.latency.time_to_first_token"] = first
        self._metrics.tracer.span("llm_request", now - took, now, attributes, parent=TRACEPARENT.get())
