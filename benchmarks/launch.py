"""Starts a real server as a process of its own, the same way as an operator: `moejax serve`."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from serving.api.client import Client

ROOT = Path(__file__).resolve().parent.parent
_STOP_LIMIT_S = 60.0
_POLL_S = 0.02


class StartFailed(RuntimeError):
    """The server ended before it was ready. The text is the end of its output."""


class Launched:
    """A running `moejax serve`. `launched_at` is a time of the monotonic clock; `ready_s`, when the server said that it
    is ready, and `first_token_s` are counted from it."""

    def __init__(
        self,
        model: str,
        ranks: int,
        *,
        cache: Path | None = None,
        limit_s: float = 1200.0,
        options: Sequence[str] = (),
    ) -> None:
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - closed by stop()
        command = [
            sys.executable,
            "-m",
            "serving",
            "serve",
            "--chaos",
            "--model",
            model,
            "--ranks",
            str(ranks),
            *options,
        ]
        environment = os.environ | ({"MOEJAX_CACHE": str(cache)} if cache is not None else {})
        self.launched_at = time.monotonic()
        self._process = subprocess.Popen(
            [*command, "--grpc-port", "0", "--http-port", "0"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self.address = self._announced(limit_s)
            self.ready_s = time.monotonic() - self.launched_at
            with Client(self.address) as client:
                client.generate("Once", temperature=0, max_tokens=1, ignore_eos=True)
        except BaseException:  # also SystemExit, of a signal while it starts
            self.stop()
            raise
        self.first_token_s = time.monotonic() - self.launched_at

    @property
    def pid(self) -> int:
        """The process id of the front."""
        with Client(self.address) as client:
            return client.status().front_pid

    @property
    def session(self) -> int:
        """The session of all processes of the server, which has the id of the supervisor."""
        return self._process.pid

    @property
    def http(self) -> str:
        """host:port of HTTP."""
        found = re.search(r"HTTP +http://(\S+:\d+)", self.output())
        assert found is not None, "the server prints it together with the address of gRPC"
        return found[1]

    def output(self) -> str:
        """The output of the server so far."""
        self._log.seek(0)
        return self._log.read()

    def stop(self) -> None:
        """Send SIGTERM and wait until the server has ended; after a minute, send SIGKILL to all its processes."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._log.close()

    def _announced(self, limit_s: float) -> str:
        """The host:port of gRPC, which the server prints when it is ready."""
        while True:
            ended = self._process.poll() is not None
            found = re.search(r"gRPC +(\S+:\d+)[\s\S]*\btry\b", self.output())
            if found is not None:
                return found[1]
            if ended or time.monotonic() - self.launched_at > limit_s:
                output = self.output()[-2000:]
                how = "ended before it was ready" if ended else f"was not ready after {limit_s:.0f} s"
                raise StartFailed(f"the server {how}:\n{output}")
            time.sleep(_POLL_S)


@contextlib.contextmanager
def launched(model: str, ranks: int, *, cache: Path | None = None, options: Sequence[str] = ()) -> Iterator[Launched]:
    """Start a server, and stop it when the block ends, also by SIGTERM.

    `model` is a name or a folder, `cache` replaces the usual cache folder, `options` are flags of `moejax serve`.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        server = Launched(model, ranks, cache=cache, options=options)
        try:
            yield server
        except Exception:
            print(f"the last output of the server:\n{server.output()[-2000:]}", file=sys.stderr)
            raise
        finally:
            server.stop()
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def cold_cache() -> Iterator[Path]:
    """A cache folder with the present models but without compiled programs, as on a host that has never served."""
    usual = Path(os.environ.get("MOEJAX_CACHE") or Path.home() / ".cache" / "moejax")
    with tempfile.TemporaryDirectory(prefix="moejax-cold-") as folder:
        for name in ("downloads", "models"):
            if (usual / name).is_dir():
                (Path(folder) / name).symlink_to(usual / name)
        yield Path(folder)
