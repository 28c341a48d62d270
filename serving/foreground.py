"""Serves in the foreground of a process until a signal ends it."""

import asyncio
import signal

from serving.app import App, Log
from serving.config import Settings
from serving.core.call_history import JournalFollower
from serving.errors import MoejaxError
from serving.launch.run_folder import RunFolder
from serving.observability import logs
from serving.protocol.backend import Backend


def serve(settings: Settings, run: RunFolder | None = None, follower: JournalFollower | None = None) -> int:
    """Serve until SIGINT or SIGTERM, then drain. Returns the exit status. `run` is the folder of a supervised front,
    `follower` has followed the journal of the front before."""
    try:
        return asyncio.run(_serve(settings, run, follower))
    except KeyboardInterrupt:
        return 130


async def _serve(settings: Settings, run: RunFolder | None, follower: JournalFollower | None) -> int:
    logs.configure(settings.log_format, settings.log_level)
    for note in settings.deprecations:
        logs.SERVER.warning("%s", note)
    log = logs.SERVER.info
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
        app = await App.start(settings, log, run, follower)
    except asyncio.CancelledError:
        log("stopped before it was ready")
        return 130
    except (MoejaxError, TimeoutError) as error:
        logs.SERVER.error(str(error) or f"not ready within {settings.start_timeout_s:.0f} s")
        return 1
    _announce(app, log)
    logging = asyncio.create_task(_log_events(app.loop))
    await stop.wait()
    logging.cancel()
    running = app.loop.status().running + app.loop.status().waiting
    log(f"draining {running} requests for up to {settings.grace_s:.0f} s" if running else "stopping")
    await app.stop()
    log("stopped")
    return 0


async def _log_events(backend: Backend) -> None:
    async for event in backend.watch():
        logs.log_event(event)


def _announce(app: App, log: Log) -> None:
    status, settings = app.loop.status(), app.settings
    mesh = ", ".join(f"{name} {size}" for name, size in status.axes.items() if size > 1)
    coverage = ", ".join(f"{loss} {share:.0%}" for loss, share in status.lattice.items())
    scheme = "https" if settings.tls_cert else "http"
    http_at, grpc_at = f"{scheme}://{settings.host}:{app.ports.http}", f"{settings.host}:{app.ports.grpc}"
    log(f"ready: {app.loop.model.name} on {len(status.ranks)} ranks (mesh {mesh or 'of one'})")
    log(f"       {status.slots_per_rank} slots per rank; losses prepared: {coverage or 'none'}")
    log(f"       ranks: {', '.join(f'{r.id} (pid {r.pid})' for r in status.ranks)}")
    log(f"gRPC   {grpc_at}")
    log(f"HTTP   {http_at}  (dashboard, /v1/completions, /v1/chat/completions, /metrics)")
    if settings.edge_listen is not None:
        log(f"edges  {settings.edge_listen.rpartition(':')[0]}:{app.edge_port}  (moejax edge --front)")
    if not settings.loopback and settings.api_keys is None:
        logs.SERVER.warning(
            "anybody who reaches %s can call this server. Set --api-keys (docs/security.md).", settings.host
        )
    log(f'try    scripts/moejax generate --server {grpc_at} "The capital of France is"')
