"""Prometheus metrics of the server's `Status`, read at the moment of the scrape: vLLM's names, then moejax's own."""

import collections
from collections.abc import Callable, Iterator, Mapping
from typing import cast

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.protocol.backend import Backend
from serving.protocol.status import RankStatus, Status

MAX_EXPERT_SERIES = 4096
"""Most (layer, expert) pairs that get a series each. Larger models export only the imbalance of each layer."""

NOT_EXPORTED: Mapping[str, Mapping[str, str]] = {
    "Status": {
        "axes": "a description of the mesh, not a number; `moejax status` prints it",
        "certificate_reason": "text; `moejax status` prints it",
        "certificate_repair": "text; `moejax status` prints it",
        "buckets": "fixed at the start; `moejax status` prints them",
        "chaos": "a setting",
        "failed": "vllm:request_success counts requests by how they ended",
        "finished": "vllm:request_success counts requests by how they ended",
        "front_pid": "a process id; Prometheus identifies a server by its address",
        "upgrade_stage": "text; `moejax status` prints it",
        "upgrade_build": "text; `moejax status` prints it",
        "upgrade_cause": "text; `moejax status` prints it",
        "next_weights_version": "there while weights are loaded; `moejax status` prints it",
        "operable": "a setting",
        "protection": "a setting",
        "recoveries": "moejax_recoveries counts them by cause and outcome",
        "slots_per_rank": "a setting",
        "speculate": "a setting",
        "tokens": "vllm:generation_tokens counts them",
    },
    "RankStatus": {
        "last_failure": "text; `moejax status` prints it",
        "host": "a label would start new series whenever a rank moves",
        "pid": "a process id",
        "rack": "a label would start new series whenever a rank moves",
        "role": "text; `moejax status` prints it",
        "running": "vllm:num_requests_running has the sum",
        "slots": "a table of the plan; `moejax status` prints it",
    },
    "LossCost": {
        "experts_to_load": "part of moejax_rank_loss_stall_seconds; `moejax what-if` prints it",
        "measured": "how the forecast was made; `moejax what-if` prints it",
        "prepared": "moejax_lattice_coverage has the share of losses that are prepared for",
        "survivable": "moejax_lattice_coverage is below 1 when a loss is not survivable",
        "traffic": "the share of traffic that the rank's experts have; `moejax what-if` prints it",
    },
}
"""Fields of the status that no metric shows, by class, and why."""

CERTIFICATE_HOLDS: Mapping[str, int] = {"holds": 1, "does not hold": 0}
"""The value of its metric by `Status.certificate`; there is none without a certificate and before its first check."""

_VLLM_COUNTERS: tuple[tuple[str, str, Callable[[Status], float]], ...] = (
    ("vllm:num_preemptions", "Requests moved back to the queue to free cache pages.", lambda s: s.preemptions),
    ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix caches.", lambda s: s.prefix_queries),
    ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix caches.", lambda s: s.prefix_hits),
    ("vllm:spec_decode_num_drafts", "Times that a request had drafts in a step.", lambda s: s.drafts),
    ("vllm:spec_decode_num_draft_tokens", "Tokens that were drafted.", lambda s: s.drafted),
    ("vllm:spec_decode_num_accepted_tokens", "Drafted tokens that were right and were sent.", lambda s: s.accepted),
)
_GAUGES: tuple[tuple[str, str, Callable[[Status], float]], ...] = (
    (
        "moejax_epoch",
        "Epoch of the plan in force; grows with each plan that is adopted.",
        lambda s: s.epoch,
    ),
    ("moejax_generation", "Process groups that the ranks have formed since the start.", lambda s: s.generation),
    ("moejax_ranks_alive", "Ranks that serve.", lambda s: len(_serving(s))),
    ("moejax_ranks", "Ranks that the server was started with.", lambda s: len(s.ranks)),
    ("moejax_ready", "1 while requests can be served.", lambda s: s.ready),
    ("moejax_draining", "1 while the server ends and accepts no new requests.", lambda s: s.draining),
    (
        "moejax_upgrading",
        "1 while an upgrade replaces processes, or is rolled back.",
        lambda s: s.upgrade in ("running", "rolling_back"),
    ),
    ("moejax_paused", "1 while an operator has paused the server.", lambda s: s.paused),
    ("moejax_start_time_seconds", "When the server started, in seconds since the epoch.", lambda s: s.started_at),
    ("moejax_journal", "1 while running requests would survive the death of the front.", lambda s: s.journal == "on"),
    (
        "moejax_protected_bytes",
        "Bytes of host memory in use for replicas of the ranks' KV caches.",
        lambda s: s.protected_bytes,
    ),
    ("moejax_parity_bytes", "Bytes of host memory in use for parity of experts.", lambda s: s.parity_bytes),
    (
        "moejax_parity_coverage",
        "Share of the wanted expert parity groups that exist, from 0 to 1.",
        lambda s: s.parity_groups / s.parity_wanted if s.parity_wanted else 1.0,
    ),
    ("moejax_edges", "Edges to which clients can connect.", lambda s: sum(edge.serving for edge in s.edges)),
    (
        "moejax_remote_edges",
        "Edges on other hosts to which clients can connect; moejax_edges counts them too.",
        lambda s: sum(edge.serving and bool(edge.host) for edge in s.edges),
    ),
    ("moejax_edge_calls", "Calls that are open at all edges.", lambda s: sum(edge.calls for edge in s.edges)),
    ("moejax_suspect_requests", "Requests that run alone, because ranks failed while they ran.", lambda s: s.suspects),
    ("moejax_kv_token_bytes", "Bytes of the KV cache of one token, over all layers.", lambda s: s.kv_token_bytes),
    ("moejax_masked_experts", "Experts that no rank holds.", lambda s: len(s.masked)),
)
_COUNTERS: tuple[tuple[str, str, Callable[[Status], float]], ...] = (
    (
        "moejax_compiles_after_ready",
        "XLA compilations after the server was ready; it should stay 0.",
        lambda s: s.compiles_after_ready,
    ),
    (
        "moejax_requests_sent",
        "Requests that went from the prefill pool to the decode pool.",
        lambda s: s.requests_sent,
    ),
    (
        "moejax_requests_returned",
        "Requests that went back to the prefill pool, to be computed again.",
        lambda s: s.requests_returned,
    ),
    ("moejax_steps", "Steps that have ended.", lambda s: s.steps),
    (
        "moejax_draft_passes_skipped",
        "Steps after which the model's layer of multi-token prediction did not run.",
        lambda s: s.draft_passes_skipped,
    ),
    (
        "moejax_step_seconds",
        "Seconds spent on steps, from scheduling to delivery of the tokens.",
        lambda s: s.step_ms / 1e3,
    ),
    (
        "moejax_step_rank_seconds",
        "Seconds of steps spent in the process of the rank that spent most.",
        lambda s: s.rank_ms / 1e3,
    ),
    ("moejax_program_seconds", "Seconds of steps spent inside compiled programs.", lambda s: s.program_ms / 1e3),
    ("moejax_rows", "Rows computed by all ranks in steps, padding included.", lambda s: s.rows),
    ("moejax_rows_filled", "Rows computed by all ranks in steps, padding excluded.", lambda s: s.rows_filled),
    (
        "moejax_tokens_restored",
        "KV cache entries of lost ranks that were restored from a replica.",
        lambda s: s.tokens_restored,
    ),
    (
        "moejax_tokens_recomputed",
        "KV cache entries of lost ranks that were computed again.",
        lambda s: s.tokens_recomputed,
    ),
    ("moejax_experts_loaded", "Experts read from the host store.", lambda s: s.experts_loaded),
    ("moejax_experts_rebuilt", "Experts rebuilt from parity.", lambda s: s.experts_rebuilt),
    (
        "moejax_weights_switches",
        "Versions of the weights that came into force since the start.",
        lambda s: s.weights_switches,
    ),
    ("moejax_upgrades_done", "Upgrades after which all processes ran the new code.", lambda s: s.upgrades_done),
    (
        "moejax_upgrades_rolled_back",
        "Upgrades after which all processes ran the former code again.",
        lambda s: s.upgrades_rolled_back,
    ),
    ("moejax_weights_repaired", "Damaged weights that were found and loaded again.", lambda s: s.restored),
    (
        "moejax_convicted_requests",
        "Requests that were ended because ranks failed whenever they ran.",
        lambda s: s.convicted,
    ),
    (
        "moejax_degraded_requests",
        "Requests that ended with tokens computed while experts were masked.",
        lambda s: s.degraded,
    ),
)


class StatusCollector(Collector):
    """Reads the status of a backend when Prometheus scrapes."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.status: Status | None = None
        """The status to export, where the backend does not have it at once."""

    def describe(self) -> list[Metric]:
        """No metrics: their names do not depend on the status, so registration need not collect."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All metrics of the status now."""
        status = self.status or cast(Status, self._backend.status())
        yield from _vllm(status, self._backend.model.name)
        yield from (GaugeMetricFamily(name, text, value(status)) for name, text, value in _GAUGES)
        yield from (CounterMetricFamily(name, text, value(status)) for name, text, value in _COUNTERS)
        yield _lattice(status)
        weights = GaugeMetricFamily("moejax_weights_info", "The version of the weights in force.", labels=["version"])
        weights.add_metric([status.weights_version], 1)
        yield weights
        yield _builds(status)
        yield _relays(status)
        if status.certificate in CERTIFICATE_HOLDS:
            yield GaugeMetricFamily(
                "moejax_certificate_holds",
                "1 while every loss that the server's certificate names would keep its service levels.",
                CERTIFICATE_HOLDS[status.certificate],
            )
        yield from _by_pool(status)
        yield from _by_rank(status)
        yield from _experts(status)


def _serving(status: Status) -> list[RankStatus]:
    return [rank for rank in status.ranks if rank.state == "serving"]


def _vllm(status: Status, model: str) -> Iterator[Metric]:
    serving = _serving(status)
    pages, used = sum(rank.pages for rank in serving), sum(rank.pages_used for rank in serving)
    for name, text, value in (
        ("vllm:num_requests_running", "Requests in the batch.", status.running),
        ("vllm:num_requests_waiting", "Requests in the queue.", status.waiting),
        ("vllm:kv_cache_usage_perc", "Share of the cache pages in use, from 0 to 1.", used / pages if pages else 0.0),
    ):
        gauge = GaugeMetricFamily(name, text, labels=["model_name"])
        gauge.add_metric([model], value)
        yield gauge
    for name, text, count in _VLLM_COUNTERS:
        counter = CounterMetricFamily(name, text, labels=["model_name"])
        counter.add_metric([model], count(status))
        yield counter
    info = GaugeMetricFamily(
        "vllm:cache_config_info",
        "Tokens in a cache page, cache pages of all serving ranks, and the data type of the cache, as labels.",
        labels=["block_size", "num_gpu_blocks", "cache_dtype"],
    )
    info.add_metric([str(status.page_size), str(pages), status.kv_cache_type], 1)
    yield info


def _builds(status: Status) -> Metric:
    builds = GaugeMetricFamily(
        "moejax_build_info", "Processes that run a build of moejax, by what they are.", labels=["process", "build"]
    )
    running = [("front", status.build), *(("edge", edge.build) for edge in status.edges)]
    running += [("rank", rank.build) for rank in _serving(status)]
    for (process, build), count in sorted(collections.Counter(running).items()):
        builds.add_metric([process, build], count)
    return builds


def _relays(status: Status) -> Metric:
    relayed = GaugeMetricFamily(
        "moejax_relayed_ranks", "Ranks that share the stream of their host agent, by host.", labels=["host"]
    )
    for host, count in sorted(collections.Counter(rank.relay for rank in status.ranks if rank.relay).items()):
        relayed.add_metric([host], count)
    return relayed


def _lattice(status: Status) -> Metric:
    coverage = GaugeMetricFamily(
        "moejax_lattice_coverage",
        "Share of the losses of a kind that the server is prepared for, from 0 to 1.",
        labels=["loss"],
    )
    for loss, share in status.lattice.items():
        coverage.add_metric([loss], share)
    return coverage


def _by_pool(status: Status) -> Iterator[Metric]:
    families = [
        GaugeMetricFamily(f"moejax_pool_{name}", text, labels=["pool"])
        for name, text in (
            ("ranks_alive", "Ranks of the pool that serve."),
            ("serving", "1 while the pool does its work; else the other pool does it."),
            ("epoch", "Epoch of the pool's plan in force."),
            ("generation", "Process groups that the pool's ranks have formed since the start."),
            ("requests_running", "Requests in the batch of the pool."),
            ("requests_waiting", "Requests in the queue of the pool."),
        )
    ]
    counters = [
        CounterMetricFamily("moejax_pool_steps", "Steps of the pool that have ended.", labels=["pool"]),
        CounterMetricFamily("moejax_pool_step_seconds", "Seconds spent on steps of the pool.", labels=["pool"]),
    ]
    for each in status.pools:
        gauges = (each.ranks, each.serving, each.epoch, each.generation, each.running, each.waiting)
        for family, value in zip((*families, *counters), (*gauges, each.steps, each.step_ms / 1e3), strict=True):
            family.add_metric([each.name], value)
    yield from (*families, *counters)


def _by_rank(status: Status) -> Iterator[Metric]:
    up = GaugeMetricFamily("moejax_rank_up", "1 while the rank serves.", labels=["rank"])
    compiles = CounterMetricFamily("moejax_rank_compiles", "XLA compilations in the rank's process.", labels=["rank"])
    step = GaugeMetricFamily("moejax_rank_step_seconds", "Duration of the rank's last step.", labels=["rank"])
    slowness = GaugeMetricFamily(
        "moejax_rank_slowness", "How much slower than the other ranks the rank is of late; 0: unknown.", labels=["rank"]
    )
    level = GaugeMetricFamily(
        "moejax_rank_device_error_level", "Level of the last error of the rank's device; 0: none.", labels=["rank"]
    )
    stall = GaugeMetricFamily(
        "moejax_rank_loss_stall_seconds",
        "Predicted stall of the streams on other ranks if the rank died now.",
        labels=["rank"],
    )
    snapshots = GaugeMetricFamily(
        "moejax_rank_state_snapshots",
        "Snapshots of states that the rank has for prefix caching, of models whose layers have states.",
        labels=["rank"],
    )
    most = GaugeMetricFamily(
        "moejax_rank_state_snapshots_max", "Most snapshots of states that the rank keeps.", labels=["rank"]
    )
    for rank in status.ranks:
        label = [str(rank.id)]
        has, at_most = rank.snapshots_used, rank.snapshots
        if at_most:
            snapshots.add_metric(label, has)
            most.add_metric(label, at_most)
        up.add_metric(label, rank.state == "serving")
        compiles.add_metric(label, rank.compiles)
        step.add_metric(label, rank.step_ms / 1e3)
        slowness.add_metric(label, rank.slowness)
        level.add_metric(label, rank.level)
        if rank.loss is not None:
            stall.add_metric(label, rank.loss.stall_ms / 1e3)
    yield from (up, compiles, step, slowness, level, stall, snapshots, most)


def _experts(status: Status) -> Iterator[Metric]:
    imbalance = GaugeMetricFamily(
        "moejax_expert_imbalance", "Tokens of the layer's busiest expert divided by the mean.", labels=["layer"]
    )
    for layer, row in enumerate(status.expert_load):
        imbalance.add_metric([str(layer)], max(row) * len(row) / sum(row) if sum(row) else 1.0)
    yield imbalance
    if sum(map(len, status.expert_load)) <= MAX_EXPERT_SERIES:
        tokens = CounterMetricFamily("moejax_expert_tokens", "Tokens routed to the expert.", labels=["layer", "expert"])
        for layer, row in enumerate(status.expert_load):
            for expert, count in enumerate(row):
                tokens.add_metric([str(layer), str(expert)], count)
        yield tokens
