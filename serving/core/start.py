"""Starts the ranks of a mesh, or takes over those of an earlier front, and the loop that serves on them."""

import asyncio
import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from planner.inputs.cluster import Cluster
from serving.config import Settings
from serving.core.loop import Loop
from serving.core.output_streams import OutputStreams
from serving.core.request_log import RequestLog
from serving.core.step_stats import StepStats
from serving.engine.limits import Limits
from serving.executor.executor import RankExecutor
from serving.executor.failure_detector import FailureDetectorSettings
from serving.launch.launcher import Launcher
from serving.launch.run_folder import RunFolder
from serving.launch.weights_record import WeightsRecord
from serving.protocol.events import EventLog
from serving.protocol.prepared_model import ModelInfo, PreparedModel
from serving.protocol.weights import WeightsVersion
from serving.recovery.failover import Failover
from serving.recovery.kv_replicas import KVReplicas
from serving.text.structured_output import GrammarMatcher
from serving.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerParts:
    """All that the loops of one server have in common. `info` is the model as clients see it, `weights` are those in
    force."""

    settings: Settings
    model: PreparedModel
    info: ModelInfo
    tokenizer: Tokenizer
    request_log: RequestLog
    events: EventLog
    weights: WeightsVersion
    weights_record: WeightsRecord
    run: RunFolder | None
    """The folder of a supervised front."""
    log: Callable[[str], None]
    launcher: Callable[..., Launcher] = Launcher.of
    """Chooses how ranks are started; it takes the arguments of `Launcher.of`."""


def pool_ranks(settings: Settings) -> Mapping[str, tuple[int, ...]]:
    """The ranks of each pool, with arch pd: the first ones compute prompts."""
    assert settings.prefill is not None
    assert settings.decode is not None
    ranks = range(settings.prefill + settings.decode)
    return {"prefill": tuple(ranks[: settings.prefill]), "decode": tuple(ranks[settings.prefill :])}


async def start_loop(
    stack: contextlib.AsyncExitStack,
    parts: ServerParts,
    *,
    pool: str = "",
    kv_replicas: KVReplicas | None = None,
    output_streams: OutputStreams | None = None,
) -> Loop:
    """The loop of a server's ranks, or of one `pool` of them, with all ranks under their first plan; it does not run
    yet. Pools share `kv_replicas` and `output_streams`. `stack` ends what was started. Raises StartError."""
    settings, ranks, run = parts.settings, None, parts.run
    if pool:
        ranks = pool_ranks(settings)[pool]
        settings, run = settings.for_pool(len(ranks)), None if run is None else run.of_pool(f"-{pool}")
    step_stats, wake = StepStats(settings, parts.info), asyncio.Event()
    failover, executor = await _start_ranks(
        stack, parts, settings, run, pool=pool, ranks=ranks, step_stats=step_stats, wake=wake, kv_replicas=kv_replicas
    )
    return Loop(
        settings,
        parts.info,
        Limits.of(settings, parts.model.max_context, states=parts.model.state_bytes > 0, layers=parts.model.layers),
        executor,
        failover,
        GrammarMatcher(parts.tokenizer, parts.info.vocab_size, parts.info.stop_tokens),
        parts.request_log,
        events=parts.events,
        step_stats=step_stats,
        wake=wake,
        output_streams=output_streams,
    )


async def _start_ranks(
    stack: contextlib.AsyncExitStack,
    parts: ServerParts,
    settings: Settings,
    run: RunFolder | None,
    *,
    pool: str,
    ranks: tuple[int, ...] | None,
    step_stats: StepStats,
    wake: asyncio.Event,
    kv_replicas: KVReplicas | None,
) -> tuple[Failover, RankExecutor]:
    """Start the ranks, or take over those of an earlier front, under their first plan. `stack` ends them."""
    within = None if run is None else run.path
    log_folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moejax-logs-", dir=within)))
    health = FailureDetectorSettings(
        heartbeat_floor_s=(
            settings.heartbeat_floor_s
            if settings.launcher == "local"
            else max(settings.heartbeat_floor_s, settings.network_heartbeat_floor_s)
        ),
        step_floor_s=settings.step_floor_s,
        command_limit_s=settings.command_limit_s,
        starved_factor=settings.starved_factor,
    )
    launcher = parts.launcher(parts.settings, parts.model, log_folder, run, ranks=ranks)
    executor = RankExecutor(
        health,
        lambda loss: failover.on_rank_lost(loss),
        launcher.starter,
        on_copied=lambda rank, copied: failover.kv_replicas.receive(rank, copied),
        on_starved=lambda rank, evidence: failover.on_rank_starved(rank, evidence),
        on_expert_load=step_stats.record_expert_load,
    )
    stack.push_async_callback(executor.close)
    await executor.open(launcher.listener)
    stack.push_async_callback(launcher.close)
    cluster = await launcher.wait_for_ranks(settings, executor.address, parts.log)
    if ranks is not None:
        if cluster is None:
            hosts = [parts.settings.host_of(rank) for rank in range(parts.settings.ranks)]
            cluster = Cluster.local(parts.settings.ranks, hosts=hosts)
        cluster = dataclasses.replace(cluster, devices=tuple(each for each in cluster.devices if each.id in ranks))
    failover = Failover(
        settings,
        parts.model,
        executor,
        (lambda text: parts.log(f"{pool}: {text}")) if pool else parts.log,
        events=parts.events,
        expert_load=lambda: step_stats.expert_load,
        wake=wake.set,
        cluster=cluster,
        single_host=settings.launcher == "local",
        kv_replicas=kv_replicas,
        sends_entries=pool == "prefill",
        host=launcher.host,
        epoch=parts.request_log.epoch,
        placement=None if run is None else run.placement,
        weights=parts.weights,
        weights_record=parts.weights_record,
    )
    stack.push_async_callback(failover.close)
    async with asyncio.timeout(settings.start_timeout_s):
        await failover.start()
    return failover, executor
