"""`moejax doctor`: looks at the machine and says what to do. Every check is a function of what it reads."""

import dataclasses
import importlib.metadata
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from serving.config import Settings

MEMORY_PER_RANK = 900 << 20
"""Bytes a rank of a small model takes beside its weights: the interpreter, JAX, its buffers."""
NEEDED_STREAM_FILES = 4096
JAX_LIMIT_S = 60.0
VERSIONS = ("jax", "jaxlib", "numpy", "grpcio", "protobuf", "orbax-checkpoint", "starlette", "uvicorn")
_DEVICES = """
import json, jax
print(json.dumps([[d.platform, d.device_kind] for d in jax.devices()]))
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One check. `state` is ok, warning or problem; `advice` says what to do about it."""

    name: str
    state: str
    text: str
    advice: str = ""


def examine(settings: Settings, cache: Path) -> Iterator[Finding]:
    """All checks for a server with these settings, the slow one (JAX) last."""
    yield python(sys.version_info[:2])
    yield from versions()
    for name in ("grpc_port", "http_port"):
        yield port(settings.host, getattr(settings, name), f"--{name.replace('_', '-')}")
    ranks_here = settings.ranks
    if settings.launcher != "local":
        host, _, number = settings.rank_listen.rpartition(":")
        yield port(host, int(number), "--rank-listen")
        ranks_here = 0
    yield memory(_available_memory(), ranks_here)
    yield host_store(Path("/dev/shm"))
    yield folder(cache)
    yield cores(len(os.sched_getaffinity(0)), ranks_here)
    yield files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    yield exposure(settings)
    yield devices()


def python(version: tuple[int, int]) -> Finding:
    """The interpreter."""
    text = ".".join(map(str, version))
    if version < (3, 11):
        return Finding(name="python", state="problem", text=text, advice="Install Python 3.11 or newer.")
    return Finding(name="python", state="ok", text=text)


def versions() -> Iterator[Finding]:
    """Packages that must be there."""
    found: dict[str, str] = {}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name="packages", state="problem", text=f"{name} is missing", advice="pip install moejax")
    yield Finding(name="packages", state="ok", text=", ".join(f"{n} {v}" for n, v in found.items()))


def port(host: str, number: int, flag: str) -> Finding:
    """Whether a server could listen there."""
    name = f"port {number}"
    if number == 0:
        return Finding(name=name, state="ok", text=f"{flag} takes a free one")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, number))
    except OSError as error:
        advice = f"Stop what listens there, or choose another with {flag}; 0 takes a free one."
        return Finding(name=name, state="problem", text=f"{host}: {error.strerror}", advice=advice)
    return Finding(name=name, state="ok", text=f"free on {host}")


def memory(available: int, ranks: int) -> Finding:
    """Free memory against what so many ranks take at least."""
    needed = ranks * MEMORY_PER_RANK
    text = f"{available / 1e9:.1f} GB available, {needed / 1e9:.1f} GB for {ranks} ranks without their weights"
    if available >= needed:
        return Finding(name="memory", state="ok", text=text)
    fewer = max(1, available // MEMORY_PER_RANK)
    return Finding(name="memory", state="problem", text=text, advice=f"Free memory, or start with --ranks {fewer}.")


def host_store(path: Path) -> Finding:
    """The memory file system that holds the host's copy of the weights."""
    if not path.is_dir() or not os.access(path, os.W_OK):
        advice = f"Mount a tmpfs at {path}; lost experts are read from the disk otherwise, which is slower."
        return Finding(name="tmpfs", state="warning", text=f"{path} cannot be written", advice=advice)
    free = shutil.disk_usage(path).free
    if free < 1 << 30:
        advice = f"mount -o remount,size=4G {path} (in a container: --shm-size 4g, or an emptyDir of medium Memory)."
        return Finding(name="tmpfs", state="warning", text=f"{free / 1e9:.1f} GB free in {path}", advice=advice)
    return Finding(name="tmpfs", state="ok", text=f"{free / 1e9:.1f} GB free in {path}")


def folder(path: Path) -> Finding:
    """The cache of models and compiled programs."""
    at = path
    while not at.exists():
        at = at.parent
    free = shutil.disk_usage(at).free
    text = f"{path}, {free / 1e9:.0f} GB free"
    if not os.access(at, os.W_OK):
        return Finding(name="cache", state="problem", text=f"{at} cannot be written", advice="Set MOEJAX_CACHE.")
    if free < 4e9:
        advice = "Free space, or set MOEJAX_CACHE to a folder with 4 GB."
        return Finding(name="cache", state="warning", text=text, advice=advice)
    return Finding(name="cache", state="ok", text=text)


def cores(count: int, ranks: int) -> Finding:
    """Processor cores against ranks, which are one thread each on a CPU."""
    text = f"{count} cores for {ranks} ranks and the front"
    if count < ranks:
        advice = "On a CPU, ranks beyond the cores take turns: correct, but slower. Start with fewer --ranks."
        return Finding(name="cores", state="warning", text=text, advice=advice)
    return Finding(name="cores", state="ok", text=text)


def files(limit: int) -> Finding:
    """Open files a process may have: each stream takes one."""
    text = f"{limit} open files at most"
    if limit < NEEDED_STREAM_FILES:
        return Finding(name="files", state="warning", text=text, advice="Raise it: ulimit -Hn 65536.")
    return Finding(name="files", state="ok", text=text)


def exposure(settings: Settings) -> Finding:
    """Who can reach the server."""
    if settings.loopback:
        return Finding(name="exposure", state="ok", text=f"{settings.host}: this machine only")
    missing = [
        flag for flag, value in (("--api-keys", settings.api_keys), ("--tls-cert", settings.tls_cert)) if not value
    ]
    if missing:
        advice = f"Set {' and '.join(missing)} (docs/security.md), or listen on 127.0.0.1."
        return Finding(name="exposure", state="warning", text=f"{settings.host}: open to the network", advice=advice)
    return Finding(name="exposure", state="ok", text=f"{settings.host}: with API keys and TLS")


def devices() -> Finding:
    """What JAX sees, asked in a process of its own as the front never imports it."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _DEVICES], capture_output=True, text=True, timeout=JAX_LIMIT_S, check=True
        )
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        text, advice = f"JAX did not answer within {JAX_LIMIT_S:.0f} s", "Another process may hold the device."
        return Finding(name="jax", state="problem", text=text, advice=advice)
    except (subprocess.CalledProcessError, ValueError, IndexError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        advice = "Install jax for this machine: pip install 'jax[cuda12]' on NVIDIA, 'jax[tpu]' on TPU, jax on a CPU."
        return Finding(name="jax", state="problem", text=said[-1] if said else "failed", advice=advice)
    kinds = sorted({f"{platform} ({kind})" for platform, kind in found})
    return Finding(
        name="jax", state="ok", text=f"{len(found)} device{'s' if len(found) > 1 else ''}: {', '.join(kinds)}"
    )


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0
