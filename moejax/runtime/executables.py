"""Compiled programs: compiled once per mesh shape, stored, and moved to any set of devices in milliseconds.

An executable carries its device assignment. The public loader accepts only the devices it was compiled for;
`_Mover` maps them and hands new compile options to the runtime. Loading an executable runs code: the store is a
folder of its owner alone, and files of others are refused.
"""

import contextlib
import fcntl
import functools
import hashlib
import io
import os
import pickle
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import compiler
from jax.experimental import serialize_executable

from moejax.config.mesh import JaxDevice
from moejax.ops import cpu

LOOK_S = 0.05
"""Seconds between two looks whether another process has given up its claim."""


class ExecutableStoreError(RuntimeError):
    """The folder of executables cannot be trusted or used: says which file and why."""


class CompileCounter:
    """Counts XLA compiles of this process."""

    EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        if event == self.EVENT:
            self.count += 1


class ExecutableStore:
    """Serialized executables by name, shared by the ranks of a host."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = self.folder.stat()
        if state.st_uid != os.getuid() or state.st_mode & 0o022:
            raise ExecutableStoreError(
                f"{self.folder} belongs to user {state.st_uid} with mode {state.st_mode & 0o777:o}; executables are "
                f"code, so the folder must belong to user {os.getuid()} and be writable by no one else. "
                "Remove it or set another."
            )
        self._blobs: dict[str, Any] = {}
        self._lock = threading.Lock()

    def has(self, name: str) -> bool:
        """True when the executable was compiled before."""
        return (self.folder / name).is_file()

    @contextlib.contextmanager
    def claim(self, name: str, wait_s: float) -> Iterator[bool]:
        """Claim the compile of `name`, so that one process of the host does it. Yields whether the claim was got within
        `wait_s` seconds. A claim ends with its process."""
        path, until = self.folder / f"{name}.claim", time.monotonic() + wait_s
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
            while not (mine := _lock(file.fileno())) and time.monotonic() < until:
                time.sleep(LOOK_S)
            try:
                yield mine
            finally:
                if mine:
                    path.unlink(missing_ok=True)

    def put(self, name: str, compiled: jax.stages.Compiled, devices: Sequence[JaxDevice]) -> None:
        """Keep a fresh compile. Written whole or not at all, so that several processes may do it at once."""
        blob = pickle.dumps((serialize_executable.serialize(compiled), [d.id for d in devices]))
        part = self.folder / f"{name}.{os.getpid()}.part"
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(blob)
        part.rename(self.folder / name)

    def load(self, name: str, devices: Sequence[JaxDevice]) -> Callable[..., Any]:
        """The executable `name` for `devices`, in mesh order; they may be others than it was compiled for."""
        (blob, in_tree, out_tree), compiled_for = self._read(name)
        unloaded, args, no_kwargs = _Mover(blob, compiled_for, devices).load()
        return jax.stages.Compiled(unloaded.load(), [], in_tree.unflatten(args), out_tree, no_kwargs=no_kwargs)

    def _read(self, name: str) -> Any:
        with self._lock:
            if name not in self._blobs:
                path = self.folder / name
                if path.stat().st_uid != os.getuid():
                    raise ExecutableStoreError(
                        f"{path} belongs to user {path.stat().st_uid}; it is not loaded. Remove it."
                    )
                self._blobs[name] = pickle.loads(path.read_bytes())
            return self._blobs[name]


def _lock(file: int) -> bool:
    """False while another process holds the lock of an open file; a lock ends when its file is closed. On a file system
    without locks nobody does."""
    with contextlib.suppress(OSError):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


class _Mover(serialize_executable._JaxPjrtUnpickler):
    """Unpickles an executable onto other devices than it was compiled for."""

    def __init__(self, blob: bytes, compiled_for: Sequence[int], devices: Sequence[JaxDevice]) -> None:
        super().__init__(io.BytesIO(blob), devices[0].client, devices)
        self.devices_by_id = dict(zip(compiled_for, devices, strict=True))
        self.options = compiler.get_compile_options(
            num_replicas=1, num_partitions=len(devices), device_assignment=np.array(devices)[None, :]
        )

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "exec":
            return self.backend.deserialize_executable(
                pid[1], executable_devices=self.execution_devices, compile_options=self.options
            )
        return super().persistent_load(pid)


def executable_name(kind: str, *parts: object) -> str:
    """A name that changes with whatever the compiled code depends on: `parts`, the source of what is compiled, the
    versions of jax and jaxlib, the flags of XLA, the processor, and the kind of device."""
    device = jax.local_devices()[0]
    about = (
        *map(repr, parts),
        *_machine(),
        device.platform,
        device.device_kind,
        os.environ.get("XLA_FLAGS", ""),
        os.environ.get("NPROC", ""),
    )
    return f"{kind}-{hashlib.sha256(chr(0).join(about).encode()).hexdigest()[:32]}"


def numerics_fingerprint() -> str:
    """A digest that is equal on two hosts whose ranks compute the same numbers to the last bit."""
    return hashlib.sha256(chr(0).join(_machine()).encode()).hexdigest()[:16]


def _machine() -> tuple[str, ...]:
    import jaxlib

    versions = jax.__version__, jaxlib.__version__
    return _source_digest(), cpu.fingerprint(), *versions, platform.machine(), _cpu_flags()


_COMPILED = ("config", "model", "ops", "runtime/steps.py")
"""The source of compiled programs, below `moejax/`: rooms with all of their modules, and single modules."""


def compiled_sources() -> list[Path]:
    """The files whose change makes every stored executable stale."""
    root = Path(__file__).parents[1]
    found = (root / name for name in _COMPILED)
    return sorted(file for each in found for file in (each.rglob("*.py") if each.is_dir() else (each,)))


@functools.cache
def _source_digest() -> str:
    """The digest of the sources when it was first asked for, soon after their import: a rank names hundreds of
    executables, and its code stays what it was when files change."""
    digest = hashlib.sha256()
    for file in compiled_sources():
        digest.update(file.read_bytes())
    return digest.hexdigest()


@functools.cache
def _cpu_flags() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return line
    return ""
