"""The application: prepares the model, starts the ranks, opens gRPC and HTTP, and ends all of it again."""

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Self

from planner.plan.shape import POOLS
from serving.api.surfaces import Ports, open_surfaces, raise_file_limit
from serving.auth.limits import CallLimits
from serving.auth.tls import ServerTls
from serving.config import Settings, listed
from serving.core.bucket_counts import BucketCounts, resolve_buckets
from serving.core.call_history import JournalFollower
from serving.core.loop import Loop
from serving.core.pools import Pools, start_pools
from serving.core.request_log import RequestLog
from serving.core.request_processor import RequestProcessor
from serving.core.start import ServerParts, start_loop
from serving.core.upgrades import Upgrades
from serving.edges.edge_listener import EdgeListener
from serving.edges.front_socket import FrontSocket
from serving.edges.served_model import ServedModel
from serving.errors import InvalidRequest, StartError
from serving.launch.run_folder import RunFolder
from serving.launch.upgrade_record import UpgradeRecord
from serving.launch.weights_record import WeightsRecord
from serving.observability import logs
from serving.observability.metrics import Metrics
from serving.observability.tracing import open_tracer
from serving.protocol.events import EventLog
from serving.protocol.prepared_model import PreparedModel, check_speculation, prepare_model, prepare_weights
from serving.protocol.weights import WeightsVersion
from serving.recovery.certificate_watch import read_signed
from serving.recovery.failover import Failover
from serving.recovery.kv_replicas import STATES_NOT_KEPT
from serving.recovery.published_checks import check_published
from serving.text.model_files import load_defaults, load_tokenizer

EVENTS_OF_A_FRONT = 1_000_000
"""The events of a front that takes over have sequences above a multiple of this."""

Log = Callable[[str], None]
"""Takes a line for the user who starts the server."""


def no_log(_: str) -> None:
    """Log nothing."""


class App:
    """A running server in this event loop. `await App.start(settings)`, then `await app.stop()`."""

    def __init__(self, settings: Settings, processor: RequestProcessor, loop: Loop | Pools) -> None:
        self.settings = settings
        self.processor = processor
        self.loop = loop
        self.ports = Ports(grpc=0, http=0)
        self._edge_listener: EdgeListener | None = None
        self._stack = contextlib.AsyncExitStack()

    @property
    def failover(self) -> Failover:
        """The ranks of the server, or of its decode pool."""
        return self.loop.failover

    @property
    def edge_port(self) -> int:
        """The port where edges on other hosts connect; 0 without one."""
        return 0 if self._edge_listener is None else self._edge_listener.port

    @classmethod
    async def start(
        cls,
        settings: Settings,
        log: Log = no_log,
        run: RunFolder | None = None,
        follower: JournalFollower | None = None,
    ) -> Self:
        """Start a server, and return when it can serve its first request and every planned loss is prepared for.

        `run` is the folder of a supervised front, `follower` has followed the journal of the front before. Raises
        StartError naming the process and the cause; nothing keeps running then.
        """
        raise_file_limit()
        limits, tls = CallLimits.of(settings), ServerTls.of(settings)  # their errors come before the slow part
        edge_listener = _edge_listener(settings, run)
        if run is None or not run.ports:  # a front that takes over shows what is wrong with it instead
            read_signed(settings)
        check_published(settings)
        model = (await _prepared(settings, log, run)).with_context(settings.max_context, log).with_known_tokens(log)
        check_speculation(model, settings.speculate)
        if model.state_bytes:
            log(STATES_NOT_KEPT.format(name=model.name))
        tokenizer = load_tokenizer(settings, model)
        defaults = load_defaults(settings, model)
        saved_counts = BucketCounts.for_server(settings, model)
        settings = resolve_buckets(settings, saved_counts, log, run)
        async with contextlib.AsyncExitStack() as stack, _ends_at_once_in_an_upgrade(run):
            request_log = _open_request_log(settings, run, follower)
            stack.callback(request_log.close)
            weights_record = _weights_record(settings, model, run)
            weights_record.remove_unneeded()
            weights = await _weights_in_force(settings, model, weights_record.load(), log)
            info = model.info()
            tokenizer.check_begin_tokens(info.vocab_size)
            if names := listed(settings.served_model_name):
                info = dataclasses.replace(info, name=names[0])
            parts = ServerParts(
                settings=settings,
                model=model,
                info=info,
                tokenizer=tokenizer,
                request_log=request_log,
                events=EventLog(_last_sequence(run)),
                weights=weights,
                weights_record=weights_record,
                run=run,
                log=log,
            )
            loop = await (start_pools if settings.arch == POOLS else start_loop)(stack, parts)
            tracer = None
            if settings.otlp_endpoint is not None:
                tracer = open_tracer(settings.otlp_endpoint)
                stack.callback(tracer.close)
            processor = RequestProcessor(
                loop,
                tokenizer,
                Metrics(loop, tracer),
                loop.grammar_matcher,
                max_prompt_tokens=settings.max_prompt_tokens,
                sampling_defaults=defaults,
            )
            app = cls(settings, processor, loop)
            app._edge_listener = edge_listener
            if run is not None and settings.edges and isinstance(loop, Loop):
                loop.upgrades = Upgrades(loop.engine, run)
                loop.upgrades.processor = processor
            tried = loop.start()
            for step_stats in loop.step_stats:
                if saved_counts is None:
                    break
                stack.push_async_callback(saved_counts.save, step_stats, settings.buckets)
                counting = asyncio.create_task(saved_counts.save_periodically(step_stats, settings.buckets))
                stack.callback(counting.cancel)
            stack.push_async_callback(loop.drain, 0.0)
            if tried is not None and (cause := await tried):
                raise StartError(f"this front does not answer as the one before the upgrade: {cause}")
            reader = asyncio.create_task(processor.read_unattended(request_log.running()))
            stack.callback(reader.cancel)
            if run is not None and settings.edges:
                await app._open_to_edges(stack, run, model)
            else:
                await app._open_surfaces(stack, limits, tls, run)
            if run is not None:
                run.announce(grpc_port=app.ports.grpc, http_port=app.ports.http, edge_port=app.edge_port)
            app._stack = stack.pop_all()
            return app
        raise AssertionError("unreachable: the block above returns or raises")

    async def _open_surfaces(
        self, stack: contextlib.AsyncExitStack, limits: CallLimits, tls: ServerTls | None, run: RunFolder | None
    ) -> None:
        """Start gRPC and HTTP. A port of 0 is the port of the front before this one, if there was one."""
        settings, earlier = self.settings, {} if run is None else run.ports
        wanted = Ports(
            grpc=settings.grpc_port or earlier.get("grpc_port", 0),
            http=settings.http_port or earlier.get("http_port", 0),
        )
        self.ports = (await open_surfaces(stack, self.processor, settings, limits, tls, wanted)).ports

    async def _open_to_edges(self, stack: contextlib.AsyncExitStack, run: RunFolder, model: PreparedModel) -> None:
        """Serve the edges, which have opened gRPC and HTTP or are about to, and wait for one of this machine."""
        loop, listener = self.loop, self._edge_listener
        served = None if listener is None else ServedModel.of(self.settings, model, run)
        front = FrontSocket(loop, self.processor, on_started=loop.edge_started, on_lost=loop.edge_lost, served=served)
        loop.connected_edges = lambda: front.edges
        await front.open(run.path)
        stack.push_async_callback(front.close)
        if listener is not None:
            await listener.open(front.admit, run.ports.get("edge_port", 0))
            stack.callback(listener.close)
        following = asyncio.create_task(self.processor.metrics.follow())
        stack.callback(following.cancel)
        await front.serving.wait()
        self.ports = Ports(grpc=self.settings.grpc_port, http=self.settings.http_port)

    async def stop(self, grace_s: float | None = None) -> None:
        """Drain for `grace_s` seconds (None: those of the settings), then end every process."""
        await self.loop.drain(self.settings.grace_s if grace_s is None else grace_s)
        await self._stack.aclose()


def _edge_listener(settings: Settings, run: RunFolder | None) -> EdgeListener | None:
    """The port for edges on other hosts, not yet open, if the settings want one."""
    if settings.edge_listen is None:
        return None
    if run is None:
        raise InvalidRequest(
            f"edge_listen is {settings.edge_listen} in a server inside a program, which has no edges. Run `moejax "
            "serve`, or leave it out.",
            param="edge_listen",
        )
    listener = EdgeListener(settings, settings.edge_listen)
    if not run.ports:  # a front that takes over serves the edges that it has, and says what is wrong with the file
        listener.rejection("")
    return listener


@contextlib.asynccontextmanager
async def _ends_at_once_in_an_upgrade(run: RunFolder | None) -> AsyncIterator[None]:
    """While a front starts in an upgrade, or on the way back, an error ends its process with status 1 and leaves ranks
    and calls to the front that follows, as the death of a front does."""
    try:
        yield
    except Exception as error:
        record = None if run is None else UpgradeRecord.load(run.path)
        if record is None or not record.active:
            raise
        logs.SERVER.error("%s", str(error) or type(error).__name__)
        os._exit(1)


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
        kv_cache_type=settings.kv_cache_type,
        mtp=settings.speculate == "mtp",
    )
    if run is not None:
        run.prepared.write_text(model.to_json())
    return model


def _weights_record(settings: Settings, model: PreparedModel, run: RunFolder | None) -> WeightsRecord:
    """The record of the weights in force, in the folder that outlives the server, or else this front, if there is
    one."""
    if settings.journal not in (None, "off"):
        return WeightsRecord(Path(settings.journal), model.content)
    return WeightsRecord(None if run is None else run.path, model.content)


async def _weights_in_force(
    settings: Settings, model: PreparedModel, version: WeightsVersion, log: Log
) -> WeightsVersion:
    """The recorded version, whose host store is there. Raises StartError when it cannot be made once more, or ranks
    run on other hosts, which do not have it."""
    if version.number and settings.launcher != "local":
        raise StartError(
            f"weights version {version.label} is in force by the journal, and ranks on other hosts have those of "
            f"--model, which is {settings.model}. Start with --model {version.model} and another --journal."
        )
    if not version.number or Path(version.store).is_dir():
        return version
    log(f"preparing weights version {version.label}, which the journal has, from {version.model}")
    try:
        prepared = await prepare_weights(
            version.model,
            model,
            in_place=settings.in_place,
            dense=settings.dense,
            tensor=settings.tensor,
            mtp=settings.speculate == "mtp",
        )
    except InvalidRequest as error:
        raise StartError(
            f"weights version {version.label} is in force by the journal, and is not there: {error}"
        ) from None
    if prepared.content != version.content:
        raise StartError(
            f"{version.model} holds other weights than version {version.label}, which is in force by the journal. Give "
            "it the former content, or start with another --journal."
        )
    return dataclasses.replace(version, store=prepared.store)


def journal_folder(settings: Settings, run: RunFolder | None) -> Path | None:
    """The folder of the journal; None without one."""
    if settings.journal == "off":
        return None
    if settings.journal is not None:
        return Path(settings.journal)
    return None if run is None else run.journal


def _open_request_log(settings: Settings, run: RunFolder | None, follower: JournalFollower | None) -> RequestLog:
    """The calls that a front before this one left, and a journal for the next, as the settings want it."""
    folder = journal_folder(settings, run)
    if folder is None:
        return RequestLog(None)
    if follower is not None and follower.folder != folder:
        follower = None
    return RequestLog.open(folder, retention_s=settings.resume_s, follower=follower)


def _last_sequence(run: RunFolder | None) -> int:
    """The sequence from which the events of this front go on, so that watchers of an earlier one miss none."""
    return 0 if run is None else EVENTS_OF_A_FRONT * run.next_front()
