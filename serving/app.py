"""A whole server: prepares the model, starts the ranks, opens the surfaces, and leaves nothing behind."""

import asyncio
import contextlib
import resource
import signal
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self

from serving import http, logs, rpc
from serving.batch import Bucket
from serving.config import Settings
from serving.crew import Crew
from serving.engine import Limits
from serving.errors import MoejaxError, StartError
from serving.failover import Failover
from serving.generation import Generation
from serving.guard import Guard
from serving.guided import Guides
from serving.health import HealthSettings
from serving.journal import Journal
from serving.ledger import Ledger
from serving.links import Loss, RankLinks
from serving.loop import Loop
from serving.metrics import Metrics
from serving.prepared import Prepared, prepare
from serving.run_folder import RunFolder
from serving.step_book import StepBook, with_buckets
from serving.tls import ServerTls
from serving.tokens import Tokenizer
from serving.tracing import open_tracer

Say = Callable[[str], None]


def quiet(_: str) -> None:
    """Say nothing."""


class App:
    """A running server in this event loop. `await App.start(settings)`, then `await app.stop()`."""

    def __init__(self, settings: Settings, generation: Generation, loop: Loop, failover: Failover) -> None:
        self.settings = settings
        self.generation = generation
        self.loop = loop
        self.failover = failover
        self.grpc_port = 0
        self.http_port = 0
        self._stack = contextlib.AsyncExitStack()

    @classmethod
    async def start(cls, settings: Settings, say: Say = quiet, run: RunFolder | None = None) -> Self:
        """Start everything and return when the first request can be served with the whole lattice ready.

        Raises StartError naming the process and the cause; nothing is left running then. `run` is the folder of a
        supervised front.
        """
        _raise_file_limit()
        guard, tls = Guard.of(settings), ServerTls.of(settings)  # what is wrong with them shows before the long part
        model = (await _prepared(settings, say, run)).with_context(settings.max_context)
        book = StepBook.of(settings, model)
        settings = with_buckets(settings, book, say, run)
        async with contextlib.AsyncExitStack() as stack:
            ledger = _ledger(settings, run)
            stack.callback(ledger.close)
            within = None if run is None else run.path
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moejax-logs-", dir=within)))
            hearers: list[Callable[[Loss], None]] = []

            def lost(loss: Loss) -> None:
                for hear in hearers:
                    hear(loss)

            health = HealthSettings(heartbeat_floor_s=settings.heartbeat_floor_s, step_floor_s=settings.step_floor_s)
            crew = Crew.of(settings, model, logs, run)
            links = RankLinks(health, lost, crew.launcher)
            stack.push_async_callback(links.close)
            await links.open(crew.listener)
            stack.push_async_callback(crew.close)
            cluster = await crew.gather(settings, links.address, say)
            failover = Failover(settings, model, links, say, cluster=cluster, host=crew.host)
            failover.epoch = ledger.epoch
            stack.push_async_callback(failover.close)
            async with asyncio.timeout(settings.start_timeout_s):
                await failover.start()
            tokenizer = Tokenizer.load(Path(model.folder), bos_token=model.bos_token, stop_tokens=model.stop_tokens)
            info = model.info()
            guides = Guides(tokenizer, info.vocab_size, info.stop_tokens)
            loop = Loop(settings, info, _limits(settings, model.max_context), links, failover, guides, ledger)
            hearers.append(loop.lost)
            tracer = None
            if settings.otlp_endpoint is not None:
                tracer = open_tracer(settings.otlp_endpoint)
                stack.callback(tracer.close)
            generation = Generation(
                loop, tokenizer, Metrics(loop, tracer), guides, max_prompt_tokens=settings.max_prompt_tokens
            )
            app = cls(settings, generation, loop, failover)
            loop.start()
            if book is not None:
                stack.push_async_callback(book.save, loop.tally, settings.buckets)
                counting = asyncio.create_task(book.keep(loop.tally, settings.buckets))
                stack.callback(counting.cancel)
            stack.push_async_callback(loop.drain, 0.0)
            keeper = asyncio.create_task(generation.keep(ledger.running()))
            stack.callback(keeper.cancel)
            ports = {"grpc_port": settings.grpc_port, "http_port": settings.http_port}
            ports |= {name: port for name, port in (run.ports if run is not None else {}).items() if not ports[name]}
            grpc_server = await rpc.start(
                generation,
                host=settings.host,
                port=settings.grpc_port or ports.get("grpc_port", 0),
                guard=guard,
                tls=tls,
                vllm=settings.vllm_grpc,
            )
            stack.push_async_callback(grpc_server.stop, 1.0)
            http_server = await http.start(
                generation,
                host=settings.host,
                port=settings.http_port or ports.get("http_port", 0),
                guard=guard,
                tls=tls,
            )
            stack.push_async_callback(http_server.stop, 1.0)
            app.grpc_port, app.http_port = grpc_server.port, http_server.port
            if run is not None:
                run.announce(grpc_port=app.grpc_port, http_port=app.http_port)
            app._stack = stack.pop_all()
            return app
        raise AssertionError("unreachable: the block above returns or raises")

    async def stop(self, grace_s: float | None = None) -> None:
        """Drain for `grace_s` seconds (the settings' when None), then end every process."""
        await self.loop.drain(self.settings.grace_s if grace_s is None else grace_s)
        await self._stack.aclose()


class Server:
    """A server of this program's own: starts on entering, stops on leaving.

    >>> from serving import Client, Server
    >>> with Server(model="tiny", ranks=2) as server, Client(server) as client:   # doctest: +SKIP
    ...     print(client.generate("ROMEO:", max_tokens=20).text)

    Takes the fields of `serving.config.Settings`; ports default to free ones. In a coroutine use
    `async with Server(...)` and `AsyncClient`.
    """

    def __init__(self, *, say: Say = quiet, **settings: Any) -> None:
        values: dict[str, Any] = {"grpc_port": 0, "http_port": 0} | settings
        self.settings = Settings.load(None, {}, **values)
        self._say = say
        self._thread: threading.Thread | None = None
        self._stopping: Callable[[], object] = lambda: None
        self.app: App | None = None

    @property
    def address(self) -> str:
        """host:port of gRPC. Raises StartError when the server does not run."""
        return f"{self.settings.host}:{self._running().grpc_port}"

    @property
    def url(self) -> str:
        """http://host:port of HTTP. Raises StartError when the server does not run."""
        return f"http://{self.settings.host}:{self._running().http_port}"

    def _running(self) -> App:
        if self.app is None:
            raise StartError("the server does not run. Use it as a context manager: with Server(...) as server.")
        return self.app

    def __enter__(self) -> Self:
        started: Future[None] = Future()

        def run() -> None:
            try:
                asyncio.run(self._serve(started))
            except BaseException as error:
                if not started.done():
                    started.set_exception(error)

        self._thread = threading.Thread(target=run, name="moejax-server")
        self._thread.start()
        try:
            started.result()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the loop is closed when the start failed by itself
                self._stopping()
            self._thread.join()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stopping()
        if self._thread is not None:
            self._thread.join()
        self.app = None

    async def _serve(self, started: "Future[None]") -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        self._stopping = lambda: loop.call_soon_threadsafe(stop.set)
        self.app = await App.start(self.settings, self._say)
        started.set_result(None)
        await stop.wait()
        await self.app.stop(0.0)

    async def __aenter__(self) -> Self:
        self.app = await App.start(self.settings, self._say)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._running().stop(0.0)
        self.app = None


def serve(settings: Settings, run: RunFolder | None = None) -> int:
    """Serve until SIGINT or SIGTERM, then drain. Returns the exit status. `run` is the folder of a supervised front."""
    try:
        return asyncio.run(_serve(settings, run))
    except KeyboardInterrupt:
        return 130


async def _serve(settings: Settings, run: RunFolder | None) -> int:
    logs.configure(settings.log_format, settings.log_level)
    say = logs.SERVER.info
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    main = asyncio.current_task()
    app: App | None = None

    def stopping() -> None:
        if app is None and main is not None:
            main.cancel()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping)
    try:
        app = await App.start(settings, say, run)
    except asyncio.CancelledError:
        say("stopped before it was ready")
        return 130
    except (MoejaxError, TimeoutError) as error:
        logs.SERVER.error(str(error) or f"not ready within {settings.start_timeout_s:.0f} s")
        return 1
    _announce(app, say)
    follower = asyncio.create_task(_log_events(app.loop))
    await stop.wait()
    follower.cancel()
    running = app.loop.status().running + app.loop.status().waiting
    say(f"draining {running} requests for up to {settings.grace_s:.0f} s" if running else "stopping")
    await app.stop()
    say("stopped")
    return 0


async def _log_events(loop: Loop) -> None:
    async for event in loop.watch():
        logs.log_event(event)


def _announce(app: App, say: Say) -> None:
    status, settings = app.loop.status(), app.settings
    mesh = ", ".join(f"{name} {size}" for name, size in status.axes.items() if size > 1)
    coverage = ", ".join(f"{loss} {share:.0%}" for loss, share in status.lattice.items())
    scheme = "https" if settings.tls_cert else "http"
    http_at, grpc_at = f"{scheme}://{settings.host}:{app.http_port}", f"{settings.host}:{app.grpc_port}"
    say(f"ready: {app.loop.model.name} on {len(status.ranks)} ranks (mesh {mesh or 'of one'})")
    say(f"       {status.slots_per_rank} slots per rank; losses prepared: {coverage or 'none'}")
    say(f"       ranks: {', '.join(f'{r.id} (pid {r.pid})' for r in status.ranks)}")
    say(f"gRPC   {grpc_at}")
    say(f"HTTP   {http_at}  (dashboard, /v1/completions, /v1/chat/completions, /metrics)")
    if not settings.loopback and settings.api_keys is None:
        logs.SERVER.warning(
            "anybody who reaches %s may call this server: set --api-keys (docs/security.md)", settings.host
        )
    say(f'try    scripts/moejax generate --server {grpc_at} "The capital of France is"')


async def _prepared(settings: Settings, say: Say, run: RunFolder | None) -> Prepared:
    """The model, prepared now or as a front before this one had it."""
    if run is not None and run.prepared.exists():
        return Prepared.from_json(run.prepared.read_text())
    say(f"preparing {settings.model}")
    model = await prepare(settings.model, settings.data_type, in_place=settings.in_place, dense=settings.dense)
    if run is not None:
        run.prepared.write_text(model.to_json())
    return model


def _ledger(settings: Settings, run: RunFolder | None) -> Ledger:
    """The calls that a front before this one left, and a journal for the next, as the settings want it."""
    if settings.journal == "off" or (settings.journal is None and run is None):
        return Ledger(None)
    folder = run.journal if run is not None and settings.journal is None else Path(settings.journal or "")
    journal, records = Journal.open(folder)
    return Ledger(journal, records, keep_s=settings.resume_s)


def _limits(settings: Settings, max_context: int) -> Limits:
    return Limits(
        page_size=settings.page_size,
        max_context=max_context,
        max_queue=settings.max_queue,
        buckets=tuple(Bucket(*bucket) for bucket in settings.buckets),
        tiles_while_decoding=settings.tiles_while_decoding,
        prefix_caching=settings.prefix_caching,
    )


def _raise_file_limit() -> None:
    """Thousands of streams need as many sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard) if soft < hard else (soft, hard))
