"""All private hooks into JAX's distributed runtime: the coordination service, generations, and abort.

What JAX really does when a process dies is in docs/decisions/0002-what-jax-does-when-a-rank-dies.md; this module
is the only one that relies on it.
"""

import os
import socket
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from moejax.relay import Relay

if TYPE_CHECKING:
    from moejax.shared import Arena

HEARTBEAT_TIMEOUT_S = 10**8
"""Of JAX's own service, in effect never: the front decides who is dead, and the service itself may die."""


_GPU_FLAGS = (
    "--xla_gpu_nccl_terminate_on_error=false",
    "--xla_gpu_nccl_async_execution=true",
    "--xla_gpu_nccl_blocking_communicators=false",
)


def host_coordination_service(processes: int, port: int, host: str = "127.0.0.1"):
    """The coordination service of one generation, in a process that is no rank. Keep the returned object.

    Needs jaxlib only; importing it does not import jax.
    """
    from jaxlib import _jax

    return _jax.get_distributed_runtime_service(
        f"{host}:{port}", processes, heartbeat_timeout=HEARTBEAT_TIMEOUT_S, shutdown_timeout=5, recoverable=True
    )


def keep_seats(address: str, seats: Iterable[int], processes: int) -> None:
    """Stand in for the processes `seats` of a generation until everybody knows everybody's devices, then leave.

    A process cannot come back to a coordination service, and one that was not there at the start is unknown to the
    others. But a seat that was left in good order may be taken later: by a replacement, with no new generation.
    """
    from jaxlib import _jax, xla_client

    def keep(seat: int) -> None:
        client = _connect(_jax, address, seat)
        xla_client.make_cpu_client(distributed_client=client, node_id=seat, num_nodes=processes, num_devices=1)
        client.shutdown()

    for seat in seats:
        threading.Thread(target=keep, args=(seat,), daemon=True, name=f"seat {seat}").start()


def configure_process(collective_timeout_s: int, address: str = "127.0.0.1") -> None:
    """Settings a rank process needs before JAX makes its backend. Other ranks reach this one at `address`."""
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
    _collectives_at(address)


def _collectives_at(address: str) -> None:
    """Have the CPU backend's collectives listen on one address, not on whatever the machine's name stands for."""
    from jax._src import distributed, xla_bridge
    from jaxlib import _jax

    def client():
        service = distributed.global_state.client
        gloo = _jax.make_gloo_tcp_collectives(distributed_client=service, hostname=address) if service else None
        return xla_bridge.make_cpu_client(gloo)

    xla_bridge.register_backend_factory("cpu", client, priority=0, fail_quietly=False)


class World:
    """One rank's membership of generations. A rank is in one generation at a time."""

    def __init__(self) -> None:
        self._processes: dict[int, Any] = {}
        self._devices: dict[int, Any] = {}
        self._data_planes: dict[frozenset[int], dict[int, str]] = {}
        self._arenas: dict[frozenset[int], Arena] = {}
        self._connecting: _Connecting | None = None
        self._lock = threading.Lock()
        self._relay: Relay | None = None
        self._abandoned: list[object] = []
        """Clients of services that died, and their relays: ending either would end this process."""

    def join(self, address: str, rank: int, seats: Mapping[int, int], processes: int) -> None:
        """Enter the generation at `address` as process `seats[rank]` of `processes`, leaving the one before.

        Every array of the old generation's backend is gone afterwards; copy to the host first.
        """
        import jax
        import jax.extend.backend
        from jax._src import dispatch, distributed
        from jaxlib import _jax

        state = distributed.global_state
        if self._devices:
            # JAX's caches keep the old client alive; left connected, it would end the process with its service.
            self._leave()
            # Exchanges through shared memory leave tokens behind; that of one that was aborted would raise for ever.
            dispatch.runtime_tokens.clear()
            jax.clear_caches()
            jax.extend.backend.clear_backends()
            state.client = None
        self._relay = Relay(address)
        with self._lock:
            self._data_planes.clear()
            self._close_arenas(self._arenas)
        state.coordinator_address = address
        state.process_id = seats[rank]
        state.num_processes = processes
        state.client = _connect(_jax, self._relay.address, state.process_id)
        self._processes = {d.process_index: d for d in jax.devices()}
        self._devices = {r: self._processes[seat] for r, seat in seats.items()}
        self._relay.hold()

    def seat(self, rank: int, process: int) -> None:
        """`rank` is that process of the generation from now on; communicators with its predecessor are void."""
        with self._lock:
            self._data_planes = {ranks: plane for ranks, plane in self._data_planes.items() if rank not in ranks}
            self._close_arenas(ranks for ranks in self._arenas if rank in ranks)
        self._devices[rank] = self._processes[process]

    def devices(self, ranks: Iterable[int]) -> list:
        """The devices of these ranks, in that order."""
        return [self._devices[r] for r in ranks]

    def connecting(self, ranks: Iterable[int], arena: "Arena | None" = None) -> "_Connecting":
        """A context in which the communicator of `ranks` is made: the sockets that appear are its data plane, and the
        arena, if there is one, is that of its exchange."""
        return _Connecting(self, frozenset(ranks), arena)

    def use(self, ranks: Iterable[int]) -> None:
        """The steps that follow are of this mesh."""
        arena = self._arenas.get(frozenset(ranks))
        if arena is not None:
            arena.use()

    def abort(self, ranks: Iterable[int]) -> int:
        """Shut down the sockets of one communicator, so that both ends see the end of the stream and no collective
        waits for a timeout; and its exchange. Returns how many were shut down. Safe from any thread, at any time."""
        with self._lock:
            arena = self._arenas.get(frozenset(ranks))
            if arena is not None:
                arena.abort()
            return _cut(self._data_planes.pop(frozenset(ranks), {}))

    def give_up_connecting(self) -> None:
        """Let go of a communicator that is being connected, if there is one: somebody in it is dead. Where XLA
        connects, waiting for the dead ends only by leaving the coordination service, so this process can connect no
        more in this generation; what is connected goes on. Safe from any thread, at any time."""
        with self._lock:
            if self._connecting is None:
                return
            if self._connecting.arena is not None:
                self._connecting.arena.abort()
            else:
                self._leave()
                _cut(self._connecting.appeared())

    def _leave(self) -> None:
        from jax._src import distributed

        relay, self._relay = self._relay, None
        if relay is None:
            return
        if relay.silent:  # shutting down would fail, and that ends the process
            self._abandoned.append((distributed.global_state.client, relay))
        else:
            distributed.global_state.client.shutdown()
            relay.close()

    def _begin_connecting(self, connecting: "_Connecting") -> None:
        with self._lock:
            self._connecting = connecting

    def _close_arenas(self, ranks: Iterable[frozenset[int]]) -> None:
        for each in list(ranks):
            self._arenas.pop(each).close()

    def _connected(self, ranks: frozenset[int], plane: dict[int, str], arena: "Arena | None") -> None:
        with self._lock:
            self._connecting = None
            if arena is not None:
                self._close_arenas({ranks} & self._arenas.keys())
                self._arenas[ranks] = arena
            self._data_planes.setdefault(ranks, {}).update(plane)


def _cut(plane: Mapping[int, str]) -> int:
    """Shut down sockets, given by descriptor and inode; how many of them were still open."""
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


def _connect(jaxlib: Any, address: str, process: int):
    """A client of the coordination service, registered. Waits for all processes of the generation the first time."""
    client = jaxlib.get_distributed_runtime_client(
        address, process, init_timeout=60, use_compression=True, heartbeat_timeout=HEARTBEAT_TIMEOUT_S
    )
    client.connect()
    return client


class _Connecting:
    def __init__(self, world: World, ranks: frozenset[int], arena: "Arena | None") -> None:
        self._world, self._ranks, self.arena = world, ranks, arena

    def __enter__(self) -> None:
        self._before = set(_sockets().values())
        self._world._begin_connecting(self)
        if self.arena is not None:
            self.arena.use()

    def appeared(self) -> dict[int, str]:
        return {fd: inode for fd, inode in _sockets().items() if inode not in self._before}

    def __exit__(self, *_exc: object) -> None:
        self._world._connected(self._ranks, self.appeared(), self.arena)


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
