"""What `Status` says, as metrics read at the moment of the scrape: vLLM's names, then moejax's own."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.status import Backend, RankStatus, Status

MOST_EXPERTS = 4096
"""(layer, expert) pairs that get a series each; of larger models only the imbalance of each layer is told."""


class StatusCollector(Collector):
    """Reads the backend when Prometheus asks."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def describe(self) -> list[Metric]:
        """Nothing: names do not depend on the backend's state, so nothing has to be collected to register."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All of it."""
        status, model = self._backend.status(), self._backend.model.name
        alive = [r for r in status.ranks if r.state == "serving"]
        yield from _vllm(status, alive, model)
        yield from _own(status, alive)
        yield from _by_rank(status)
        yield from _experts(status)


def _vllm(status: Status, alive: list[RankStatus], model: str) -> Iterator[Metric]:
    pages, used = sum(r.pages for r in alive), sum(r.pages_used for r in alive)
    for name, text, value in (
        ("vllm:num_requests_running", "Requests with a place in the batch.", status.running),
        ("vllm:num_requests_waiting", "Requests in the queue.", status.waiting),
        ("vllm:kv_cache_usage_perc", "Cache pages in use, 1 is all.", used / pages if pages else 0.0),
    ):
        gauge = GaugeMetricFamily(name, text, labels=["model_name"])
        gauge.add_metric([model], value)
        yield gauge
    for name, text, value in (
        ("vllm:num_preemptions", "Requests put back.", status.preemptions),
        ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix caches.", status.prefix_queries),
        ("vllm:prefix_cache_hits", "Of these, found there.", status.prefix_hits),
    ):
        counter = CounterMetricFamily(name, text, labels=["model_name"])
        counter.add_metric([model], value)
        yield counter
    info = GaugeMetricFamily(
        "vllm:cache_config_info",
        "The cache: tokens of a page, pages of all ranks.",
        labels=["block_size", "num_gpu_blocks"],
    )
    info.add_metric([str(status.page_size), str(pages)], 1)
    yield info


def _own(status: Status, alive: list[RankStatus]) -> Iterator[Metric]:
    yield GaugeMetricFamily("moejax_epoch", "Epoch of the mesh; grows with each re-plan.", status.epoch)
    yield GaugeMetricFamily("moejax_generation", "Times that ranks came in.", status.generation)
    yield GaugeMetricFamily("moejax_ranks_alive", "Ranks that serve.", len(alive))
    yield GaugeMetricFamily("moejax_ranks", "Ranks the server was started with.", len(status.ranks))
    yield GaugeMetricFamily("moejax_ready", "1 while requests can be served.", status.ready)
    yield GaugeMetricFamily("moejax_journal", "1 while requests outlive the front.", status.journal == "on")
    yield GaugeMetricFamily(
        "moejax_protected_bytes", "Host memory that copies of the ranks' caches take.", status.protected_bytes
    )
    yield GaugeMetricFamily(
        "moejax_parity_bytes", "Host memory that parity of experts takes on the ranks.", status.parity_bytes
    )
    made = status.parity_groups / status.parity_wanted if status.parity_wanted else 1.0
    yield GaugeMetricFamily("moejax_parity_coverage", "Parity groups that are made, 1 is all.", made)
    yield GaugeMetricFamily("moejax_masked_experts", "Experts without a loaded copy.", len(status.masked))
    for name, text, value in (
        ("moejax_compiles_after_ready", "XLA compiles after warm-up; 0 is right.", status.compiles_after_ready),
        ("moejax_steps", "Steps made.", status.steps),
        ("moejax_step_seconds", "Time spent on steps.", status.step_ms / 1e3),
        ("moejax_program_seconds", "Of it, inside the compiled programs.", status.program_ms / 1e3),
        ("moejax_rows", "Rows computed in steps, on all ranks.", status.rows),
        ("moejax_rows_filled", "Of these, not padding.", status.rows_filled),
        ("moejax_tokens_restored", "Cache entries of lost ranks restored from a copy.", status.tokens_restored),
        ("moejax_tokens_recomputed", "Cache entries of lost ranks computed again.", status.tokens_recomputed),
        ("moejax_experts_loaded", "Expert weights read from the host's store.", status.experts_loaded),
        ("moejax_experts_rebuilt", "Expert weights made again from parity.", status.experts_rebuilt),
    ):
        yield CounterMetricFamily(name, text, value)
    coverage = GaugeMetricFamily("moejax_lattice_coverage", "Losses prepared for, 1 is all.", labels=["loss"])
    for loss, share in status.lattice.items():
        coverage.add_metric([loss], share)
    yield coverage


def _by_rank(status: Status) -> Iterator[Metric]:
    up = GaugeMetricFamily("moejax_rank_up", "1 while the rank serves.", labels=["rank"])
    compiles = CounterMetricFamily("moejax_rank_compiles", "XLA compiles of the rank's process.", labels=["rank"])
    step = GaugeMetricFamily("moejax_rank_step_seconds", "The last step on the rank.", labels=["rank"])
    stall = GaugeMetricFamily(
        "moejax_rank_loss_stall_seconds", "How long the other streams would wait if the rank died.", labels=["rank"]
    )
    for rank in status.ranks:
        label = [str(rank.id)]
        up.add_metric(label, rank.state == "serving")
        compiles.add_metric(label, rank.compiles)
        step.add_metric(label, rank.step_ms / 1e3)
        if rank.loss is not None:
            stall.add_metric(label, rank.loss.stall_ms / 1e3)
    yield from (up, compiles, step, stall)


def _experts(status: Status) -> Iterator[Metric]:
    uneven = GaugeMetricFamily(
        "moejax_expert_imbalance", "Tokens of the layer's busiest expert over the mean.", labels=["layer"]
    )
    for layer, row in enumerate(status.expert_load):
        uneven.add_metric([str(layer)], max(row) * len(row) / sum(row) if sum(row) else 1.0)
    yield uneven
    if sum(map(len, status.expert_load)) <= MOST_EXPERTS:
        tokens = CounterMetricFamily("moejax_expert_tokens", "Tokens routed to the expert.", labels=["layer", "expert"])
        for layer, row in enumerate(status.expert_load):
            for expert, count in enumerate(row):
                tokens.add_metric([str(layer), str(expert)], count)
        yield tokens
