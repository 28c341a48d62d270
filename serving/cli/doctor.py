"""The checks of `moejax doctor`. Each check is a function of the values that it judges."""

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

from serving.config import Settings, split_address

MEMORY_PER_RANK = 900 << 20
"""Bytes that a rank of a small model needs beside its weights: the interpreter, JAX, its buffers."""
NEEDED_STREAM_FILES = 4096
JAX_LIMIT_S = 60.0
VERSIONS = ("jax", "jaxlib", "numpy", "grpcio", "protobuf", "orbax-checkpoint", "starlette", "uvicorn")
_DEVICES = """
import json, jax
print(json.dumps([[d.platform, d.device_kind] for d in jax.devices()]))
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check. `state` is ok, warning or problem; `advice` says what to do."""

    name: str
    state: str
    text: str
    advice: str = ""


def run_checks(settings: Settings, cache: Path) -> Iterator[Finding]:
    """All checks for a server with these settings. The slow one, of JAX, is the last."""
    yield check_python(sys.version_info[:2])
    yield from check_packages()
    for name in ("grpc_port", "http_port"):
        yield check_port(settings.host, getattr(settings, name), f"--{name.replace('_', '-')}")
    ranks_here = settings.ranks
    if settings.launcher != "local":
        yield check_port(*split_address(settings.rank_listen), "--rank-listen")
        ranks_here = 0
    if settings.edge_listen is not None:
        yield check_port(*split_address(settings.edge_listen), "--edge-listen")
    yield check_memory(_available_memory(), ranks_here)
    yield check_host_store(Path("/dev/shm"))
    yield check_cache(cache)
    yield check_cores(len(os.sched_getaffinity(0)), ranks_here)
    yield check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    yield check_exposure(settings)
    yield check_devices()


def check_python(version: tuple[int, int]) -> Finding:
    """The version of Python."""
    text = ".".join(map(str, version))
    if version < (3, 11):
        return Finding(name="python", state="problem", text=text, advice="Install Python 3.11 or newer.")
    return Finding(name="python", state="ok", text=text)


def check_packages() -> Iterator[Finding]:
    """The packages that a server needs."""
    found: dict[str, str] = {}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name="packages", state="problem", text=f"{name} is missing", advice="pip install moejax")
    yield Finding(name="packages", state="ok", text=", ".join(f"{n} {v}" for n, v in found.items()))


def check_port(host: str, number: int, flag: str) -> Finding:
    """The port, and if a server can listen on it."""
    name = f"port {number}"
    if number == 0:
        return Finding(name=name, state="ok", text=f"{flag} 0: any free port")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, number))
    except OSError as error:
        advice = f"Stop the program that listens there, or choose another port with {flag} (0: any free port)."
        return Finding(name=name, state="problem", text=f"{host}: {error.strerror}", advice=advice)
    return Finding(name=name, state="ok", text=f"free on {host}")


def check_memory(available: int, ranks: int) -> Finding:
    """Available memory, compared with the least that this many ranks need."""
    needed = ranks * MEMORY_PER_RANK
    text = f"{available / 1e9:.1f} GB available, {ranks} ranks need {needed / 1e9:.1f} GB beside their weights"
    if available >= needed:
        return Finding(name="memory", state="ok", text=text)
    fewer = max(1, available // MEMORY_PER_RANK)
    return Finding(name="memory", state="problem", text=text, advice=f"Free memory, or start with --ranks {fewer}.")


def check_host_store(path: Path) -> Finding:
    """The file system in memory that holds the host store of weights."""
    if not path.is_dir() or not os.access(path, os.W_OK):
        advice = f"Mount a tmpfs at {path}. Without it, lost experts are read from disk, which is slower."
        return Finding(name="tmpfs", state="warning", text=f"{path} cannot be written", advice=advice)
    free = shutil.disk_usage(path).free
    if free < 1 << 30:
        advice = f"mount -o remount,size=4G {path} (in a container: --shm-size 4g, or an emptyDir of medium Memory)."
        return Finding(name="tmpfs", state="warning", text=f"{free / 1e9:.1f} GB free in {path}", advice=advice)
    return Finding(name="tmpfs", state="ok", text=f"{free / 1e9:.1f} GB free in {path}")


def check_cache(path: Path) -> Finding:
    """The folder that caches models and compiled programs."""
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


def check_cores(count: int, ranks: int) -> Finding:
    """The number of processor cores: on a CPU, a rank computes with one thread."""
    text = f"{count} cores for {ranks} ranks and the front"
    if count < ranks:
        advice = "On a CPU, more ranks than cores take turns: correct, but slower. Start with fewer --ranks."
        return Finding(name="cores", state="warning", text=text, advice=advice)
    return Finding(name="cores", state="ok", text=text)


def check_open_files(limit: int) -> Finding:
    """The limit on open files: each stream needs one."""
    text = f"{limit} open files at most"
    if limit < NEEDED_STREAM_FILES:
        return Finding(name="files", state="warning", text=text, advice="Raise it: ulimit -Hn 65536.")
    return Finding(name="files", state="ok", text=text)


def check_exposure(settings: Settings) -> Finding:
    """Who can reach the server, and how it is protected."""
    if settings.loopback:
        return Finding(name="exposure", state="ok", text=f"{settings.host}: this machine only")
    missing = [
        flag for flag, value in (("--api-keys", settings.api_keys), ("--tls-cert", settings.tls_cert)) if not value
    ]
    if missing:
        advice = f"Set {' and '.join(missing)} (docs/security.md), or listen on 127.0.0.1."
        return Finding(name="exposure", state="warning", text=f"{settings.host}: open to the network", advice=advice)
    return Finding(name="exposure", state="ok", text=f"{settings.host}: with API keys and TLS")


def check_devices() -> Finding:
    """The devices that JAX finds, in a process of its own because the front never imports JAX."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _DEVICES], capture_output=True, text=True, timeout=JAX_LIMIT_S, check=True
        )
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        text, advice = f"JAX did not answer within {JAX_LIMIT_S:.0f} s", "Another process may hold the device."
        return Finding(name="jax", state="problem", text=text, advice=advice)
    except (subprocess.CalledProcessError, ValueError, IndexError) as error:
        output = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        advice = "Install jax for this machine: pip install 'jax[cuda12]' on NVIDIA, 'jax[tpu]' on TPU, jax on a CPU."
        return Finding(name="jax", state="problem", text=output[-1] if output else "failed", advice=advice)
    kinds = sorted({f"{platform} ({kind})" for platform, kind in found})
    return Finding(
        name="jax", state="ok", text=f"{len(found)} device{'s' if len(found) > 1 else ''}: {', '.join(kinds)}"
    )


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0
