"""The application: prepares the model, starts the ranks, opens gRPC and HTTP, and ends all of it again."""

import asyncio
import contextlib
import dataclasses
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Self

from serving.api.grpc.server import start_grpc
from serving.api.http.server import start_http
from serving.auth.limits import CallLimits
from serving.auth.tls import ServerTls
from serving.config import Settings, listed
from serving.core.bucket_counts import BucketCounts, resolve_buckets
from serving.core.journal import Journal
from serving.core.loop import Loop
from serving.core.request_log import RequestLog
from serving.core.request_processor import RequestProcessor
from serving.core.step_stats import StepStats
from serving.engine.limits import Limits
from serving.executor.executor import RankExecutor
from serving.executor.failure_detector import FailureDetectorSettings
from serving.launch.launcher import Launcher
from serving.launch.run_folder import RunFolder
from serving.observability.metrics import Metrics
from serving.observability.tracing import open_tracer
from serving.protocol.events import EventLog
from serving.protocol.prepared_model import PreparedModel, prepare_model
from serving.recovery.certificate_watch import read_signed
from serving.recovery.failover import Failover
from serving.text.generation_config import load_sampling_defaults
from serving.text.structured_output import GrammarMatcher
from serving.text.tokenizer import Tokenizer

Log = Callable[[str], None]
"""Takes a line for the user who starts the server."""


def no_log(_: str) -> None:
    """Log nothing."""


class App:
    """A running server in this event loop. `await App.start(settings)`, then `await app.stop()`."""

    def __init__(self, settings: Settings, processor: RequestProcessor, loop: Loop, failover: Failover) -> None:
        self.settings = settings
        self.processor = processor
        self.loop = loop
        self.failover = failover
        self.grpc_port = 0
        self.http_port = 0
        self._stack = contextlib.AsyncExitStack()

    @classmethod
    async def start(cls, settings: Settings, log: Log = no_log, run: RunFolder | None = None) -> Self:
        """Start a server, and return when it can serve its first request and every planned loss is prepared for.

        `run` is the folder of a supervised front. Raises StartError naming the process and the cause; nothing keeps
        running then.
        """
        _raise_file_limit()
        limits, tls = CallLimits.of(settings), ServerTls.of(settings)  # their errors come before the slow part
        if run is None or not run.ports:  # a front that takes over shows what is wrong with it instead
            read_signed(settings)
        model = (await _prepared(settings, log, run)).with_context(settings.max_context, log).with_known_tokens(log)
        tokenizer = _load_tokenizer(settings, model)
        off = settings.generation_config == "off"
        defaults = None if off else load_sampling_defaults(Path(model.folder), model.vocab_size)
        saved_counts = BucketCounts.for_server(settings, model)
        settings = resolve_buckets(settings, saved_counts, log, run)
        async with contextlib.AsyncExitStack() as stack:
            request_log = _open_request_log(settings, run)
            stack.callback(request_log.close)
            events, step_stats, wake = EventLog(), StepStats(settings, model.info()), asyncio.Event()
            failover, executor = await _start_ranks(
                stack,
                settings,
                model,
                log,
                run,
                events=events,
                step_stats=step_stats,
                wake=wake,
                epoch=request_log.epoch,
            )
            info = model.info()
            tokenizer.check_begin_tokens(info.vocab_size)
            if names := listed(settings.served_model_name):
                info = dataclasses.replace(info, name=names[0])
            grammar_matcher = GrammarMatcher(tokenizer, info.vocab_size, info.stop_tokens)
            loop = Loop(
                settings,
                info,
                Limits.of(settings, model.max_context),
                executor,
                failover,
                grammar_matcher,
                request_log,
                events=events,
                step_stats=step_stats,
                wake=wake,
            )
            tracer = None
            if settings.otlp_endpoint is not None:
                tracer = open_tracer(settings.otlp_endpoint)
                stack.callback(tracer.close)
            processor = RequestProcessor(
                loop,
                tokenizer,
                Metrics(loop, tracer),
                grammar_matcher,
                max_prompt_tokens=settings.max_prompt_tokens,
                sampling_defaults=defaults,
            )
            app = cls(settings, processor, loop, failover)
            loop.start()
            if saved_counts is not None:
                stack.push_async_callback(saved_counts.save, step_stats, settings.buckets)
                counting = asyncio.create_task(saved_counts.save_periodically(step_stats, settings.buckets))
                stack.callback(counting.cancel)
            stack.push_async_callback(loop.drain, 0.0)
            reader = asyncio.create_task(processor.read_unattended(request_log.running()))
            stack.callback(reader.cancel)
            await app._open_surfaces(stack, limits, tls, run)
            app._stack = stack.pop_all()
            return app
        raise AssertionError("unreachable: the block above returns or raises")

    async def _open_surfaces(
        self, stack: contextlib.AsyncExitStack, limits: CallLimits, tls: ServerTls | None, run: RunFolder | None
    ) -> None:
        """Start gRPC and HTTP. A port of 0 is the port of the front before this one, if there was one."""
        settings, earlier = self.settings, {} if run is None else run.ports
        grpc_server = await start_grpc(
            self.processor,
            host=settings.host,
            port=settings.grpc_port or earlier.get("grpc_port", 0),
            limits=limits,
            tls=tls,
            vllm=settings.vllm_grpc,
        )
        stack.push_async_callback(grpc_server.stop, 1.0)
        http_server = await start_http(
            self.processor,
            host=settings.host,
            port=settings.http_port or earlier.get("http_port", 0),
            limits=limits,
            tls=tls,
            settings=settings,
        )
        stack.push_async_callback(http_server.stop, 1.0)
        self.grpc_port, self.http_port = grpc_server.port, http_server.port
        if run is not None:
            run.announce(grpc_port=self.grpc_port, http_port=self.http_port)

    async def stop(self, grace_s: float | None = None) -> None:
        """Drain for `grace_s` seconds (None: those of the settings), then end every process."""
        await self.loop.drain(self.settings.grace_s if grace_s is None else grace_s)
        await self._stack.aclose()


async def _start_ranks(
    stack: contextlib.AsyncExitStack,
    settings: Settings,
    model: PreparedModel,
    log: Log,
    run: RunFolder | None,
    *,
    events: EventLog,
    step_stats: StepStats,
    wake: asyncio.Event,
    epoch: int,
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
        starved_factor=settings.starved_factor,
    )
    launcher = Launcher.of(settings, model, log_folder, run)
    executor = RankExecutor(
        health,
        lambda loss: failover.on_rank_lost(loss),
        launcher.starter,
        on_copied=lambda rank, copied: failover.kv_replicas.receive(rank, copied),
        on_starved=lambda rank, evidence: failover.on_rank_starved(rank, evidence),
    )
    stack.push_async_callback(executor.close)
    await executor.open(launcher.listener)
    stack.push_async_callback(launcher.close)
    cluster = await launcher.wait_for_ranks(settings, executor.address, log)
    failover = Failover(
        settings,
        model,
        executor,
        log,
        events=events,
        expert_load=lambda: step_stats.expert_load,
        wake=wake.set,
        cluster=cluster,
        host=launcher.host,
        epoch=epoch,
    )
    stack.push_async_callback(failover.close)
    async with asyncio.timeout(settings.start_timeout_s):
        await failover.start()
    return failover, executor


async def _prepared(settings: Settings, log: Log, run: RunFolder | None) -> PreparedModel:
    """The model, prepared now or by an earlier front of the same supervisor."""
    if run is not None and run.prepared.exists():
        return PreparedModel.from_json(run.prepared.read_text())
    log(f"preparing {settings.model}")
    model = await prepare_model(
        settings.model,
        settings.data_type,
        in_place=settings.in_place,
        dense=settings.dense,
        tensor=settings.tensor,
    )
    if run is not None:
        run.prepared.write_text(model.to_json())
    return model


def _load_tokenizer(settings: Settings, model: PreparedModel) -> Tokenizer:
    return Tokenizer.load(
        Path(model.folder),
        bos_token=model.bos_token,
        stop_tokens=model.stop_tokens,
        chat_template=None if settings.chat_template is None else Path(settings.chat_template),
        tool_call_parser=settings.tool_call_parser,
        reasoning_parser=settings.reasoning_parser,
    )


def _open_request_log(settings: Settings, run: RunFolder | None) -> RequestLog:
    """The calls that a front before this one left, and a journal for the next, as the settings want it."""
    if settings.journal == "off" or (settings.journal is None and run is None):
        return RequestLog(None)
    folder = run.journal if run is not None and settings.journal is None else Path(settings.journal or "")
    journal, records = Journal.open(folder)
    return RequestLog(journal, records, retention_s=settings.resume_s)


def _raise_file_limit() -> None:
    """Raise the limit on open files: every stream needs a socket."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard) if soft < hard else (soft, hard))
