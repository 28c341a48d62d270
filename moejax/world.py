"""All private hooks into JAX's distributed runtime: the coordination service, generations, and abort.

What JAX really does when a process dies is in docs/decisions/0002-what-jax-does-when-a-rank-dies.md; this module
is the only one that relies on it.
"""

import os
import socket
import threading
from collections.abc import Iterable, Sequence

HEARTBEAT_TIMEOUT_S = 3600
"""Of JAX's own service: the front decides who is dead, long before this."""


_GPU_FLAGS = (
    "--xla_gpu_nccl_terminate_on_error=false",
    "--xla_gpu_nccl_async_execution=true",
    "--xla_gpu_nccl_blocking_communicators=false",
)


def host_coordination_service(ranks: int, port: int, host: str = "127.0.0.1"):
    """The coordination service of one generation, in a process that is no rank. Keep the returned object.

    Needs jaxlib only; importing it does not import jax.
    """
    from jaxlib import _jax

    return _jax.get_distributed_runtime_service(
        f"{host}:{port}", ranks, heartbeat_timeout=HEARTBEAT_TIMEOUT_S, shutdown_timeout=5, recoverable=True
    )


def configure_process(collective_timeout_s: int) -> None:
    """Settings a rank process needs before JAX makes its backend."""
    flags = [
        os.environ.get("XLA_FLAGS", ""),
        f"--xla_cpu_collective_timeout_seconds={collective_timeout_s}",
        "--xla_cpu_multi_thread_eigen=false",
    ]
    if "cuda" in os.environ.get("JAX_PLATFORMS", ""):
        flags += _GPU_FLAGS
        os.environ.setdefault("XLA_PYTHON_CLIENT_ABORT_COLLECTIVES_ON_FAILURE", "1")
        os.environ.setdefault("XLA_PYTHON_CLIENT_USE_TFRT_GPU_CLIENT", "1")
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()
    os.environ.setdefault("NPROC", "1")
    import jax

    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_num_cpu_devices", 1)
    # What comes out of JAX's own cache cannot be serialized again on CPU; the executable store takes its place.
    jax.config.update("jax_enable_compilation_cache", False)


class World:
    """One rank's membership of generations. A rank is in one generation at a time."""

    def __init__(self) -> None:
        self._devices: dict[int, object] = {}
        self._data_planes: dict[frozenset[int], dict[int, str]] = {}
        self._lock = threading.Lock()

    def join(self, address: str, rank: int, members: Sequence[int]) -> None:
        """Enter the generation at `address` as process `members.index(rank)`, leaving the one before.

        Every array of the old generation's backend is gone afterwards; copy to the host first.
        """
        import jax
        import jax.extend.backend
        from jax._src import distributed
        from jaxlib import _jax

        state = distributed.global_state
        if self._devices:
            # JAX's caches keep the old client alive; left connected, it would end the process with its service.
            state.client.shutdown()
            jax.clear_caches()
            jax.extend.backend.clear_backends()
            state.client = None
        with self._lock:
            self._data_planes.clear()
        state.coordinator_address = address
        state.process_id = list(members).index(rank)
        state.num_processes = len(members)
        state.client = _jax.get_distributed_runtime_client(
            address,
            state.process_id,
            init_timeout=60,
            use_compression=True,
            heartbeat_timeout=HEARTBEAT_TIMEOUT_S,
        )
        state.client.connect()
        self._devices = {members[d.process_index]: d for d in jax.devices()}

    def devices(self, ranks: Iterable[int]) -> list:
        """The devices of these ranks, in that order."""
        return [self._devices[r] for r in ranks]

    def connecting(self, ranks: Iterable[int]) -> "_Connecting":
        """A context in which the communicator of `ranks` is made: the sockets that appear are its data plane."""
        return _Connecting(self, frozenset(ranks))

    def abort(self, ranks: Iterable[int]) -> int:
        """Shut down the sockets of one communicator, so that both ends see the end of the stream and no collective
        waits for a timeout. Returns how many were shut down. Safe from any thread, at any time."""
        with self._lock:
            plane = self._data_planes.pop(frozenset(ranks), {})
        open_now = _sockets()
        cut = 0
        for descriptor, inode in plane.items():
            if open_now.get(descriptor) == inode:
                try:
                    with socket.socket(fileno=os.dup(descriptor)) as end:
                        end.shutdown(socket.SHUT_RDWR)
                    cut += 1
                except OSError:
                    continue
        return cut

    def _connected(self, ranks: frozenset[int], plane: dict[int, str]) -> None:
        with self._lock:
            self._data_planes.setdefault(ranks, {}).update(plane)


class _Connecting:
    def __init__(self, world: World, ranks: frozenset[int]) -> None:
        self._world, self._ranks = world, ranks

    def __enter__(self) -> None:
        self._before = set(_sockets().values())

    def __exit__(self, *_exc: object) -> None:
        appeared = {fd: inode for fd, inode in _sockets().items() if inode not in self._before}
        self._world._connected(self._ranks, appeared)


def _sockets() -> dict[int, str]:
    found = {}
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            continue
        if target.startswith("socket:"):
            found[int(descriptor)] = target
    return found
