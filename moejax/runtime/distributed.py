"""All private hooks into JAX's distributed runtime: the coordination service, generations, and abort.

docs/decisions/0002-what-jax-does-when-a-rank-dies.md says how JAX behaves when a process dies; this module is the only
one that relies on it.
"""

import importlib
import os
import platform
import re
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from moejax.runtime.relay import Relay

HEARTBEAT_TIMEOUT_S = 10**8
"""Heartbeat timeout of JAX's own service, in effect never: the front decides which rank is dead."""
ENTER_S = 1.0
"""Seconds after the end of its coordination service that a rank has to have entered it."""
_EXCHANGE_FAILURES = re.compile(r"gloo|nccl|the exchange (was aborted|waited too long)", re.IGNORECASE)
_UNFUSED_FLAGS = ("--xla_cpu_max_isa=AVX", "--xla_backend_optimization_level=1")
"""Instructions without fused products and sums, which LLVM at this level fuses in one program and not in another
(docs/decisions/0001), and the level."""
CPU_FLAGS = (
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
    *(_UNFUSED_FLAGS if platform.machine() in ("x86_64", "AMD64") else ()),
)
"""Half the processor time for a first start's compiles, and steps as fast: on this repository's programs, whose heavy
parts are kernels of their own. What the environment's XLA_FLAGS say comes after these, so it prevails."""
_GPU_FLAGS = (
    "--xla_gpu_nccl_terminate_on_error=false",
    "--xla_gpu_nccl_async_execution=true",
    "--xla_gpu_nccl_blocking_communicators=false",
)


def host_coordination_service(processes: int, port: int, host: str = "127.0.0.1"):
    """The coordination service of one generation, in a process that is no rank. Keep the returned object.

    Needs jaxlib only; importing it does not import jax.
    """
    return _native().get_distributed_runtime_service(
        f"{host}:{port}", processes, heartbeat_timeout=HEARTBEAT_TIMEOUT_S, shutdown_timeout=5, recoverable=True
    )


def stand_in(address: str, process_ids: Iterable[int], processes: int) -> list[threading.Thread]:
    """Connect as each of these processes of a generation until all of its processes know all devices, then leave.
    Returns the threads that do so; one that cannot ends this process.

    A process cannot come back to a coordination service, and the others do not know a process that was missing at the
    start. But a rank can later use a process id that was left in good order, and then waits for nobody. Process 0
    publishes what all know of all devices, once: no rank can follow it.
    """
    from jaxlib import xla_client

    def keep(process_id: int) -> None:
        client = _connect(address, process_id)
        xla_client.make_cpu_client(distributed_client=client, node_id=process_id, num_nodes=processes, num_devices=1)
        client.shutdown()

    def run(process_id: int) -> None:
        try:
            keep(process_id)
        except Exception as error:  # ranks would wait for this process
            print(f"process {process_id} has no stand-in: {error}", file=sys.stderr, flush=True)
            os._exit(1)

    threads = []
    for process_id in process_ids:
        threads.append(threading.Thread(target=run, args=(process_id,), daemon=True, name=f"process {process_id}"))
        threads[-1].start()
    return threads


def configure_process(collective_timeout_s: int, address: str = "127.0.0.1") -> None:
    """Settings a rank process needs before JAX makes its backend. Other ranks reach this one at `address`."""
    cuda = "cuda" in os.environ.get("JAX_PLATFORMS", "")
    flags = [
        *(() if cuda else CPU_FLAGS),
        os.environ.get("XLA_FLAGS", ""),
        f"--xla_cpu_collective_timeout_seconds={collective_timeout_s}",
        "--xla_cpu_multi_thread_eigen=false",
    ]
    if cuda:
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
    # An executable from JAX's own cache cannot be serialized again on CPU; the executable store replaces that cache.
    jax.config.update("jax_enable_compilation_cache", False)
    _collectives_at(address)


def _collectives_at(address: str) -> None:
    """Make the CPU backend's collectives listen on one address instead of the one that the host name resolves to."""
    from jax._src import distributed, xla_bridge

    def client():
        service = distributed.global_state.client
        gloo = _native().make_gloo_tcp_collectives(distributed_client=service, hostname=address) if service else None
        return xla_bridge.make_cpu_client(gloo)

    xla_bridge.register_backend_factory("cpu", client, priority=0, fail_quietly=False)


def is_exchange_failure(error: Exception) -> bool:
    """Whether an error of a program is that of an exchange between ranks: a connection that was lost, a wait that took
    too long, or an abort. The texts are those of XLA's collectives and of `moejax/ops/cpu/shared.cc`."""
    return type(error).__name__ == "JaxRuntimeError" and _EXCHANGE_FAILURES.search(str(error)) is not None


@runtime_checkable
class ExchangeMemory(Protocol):
    """The memory through which the ranks of a mesh exchange: `moejax.model.shared_memory.Arena`, whose module imports
    jax."""

    def use(self) -> None:
        """Send all exchanges of this process through this memory from now on."""
        ...

    def abort(self) -> None:
        """Make every thread that waits for an exchange get an error."""
        ...

    def close(self) -> None:
        """Unmap the memory."""
        ...


class World:
    """One rank's membership of generations. A rank is in one generation at a time."""

    def __init__(self) -> None:
        self._processes: dict[int, Any] = {}
        self._devices: dict[int, Any] = {}
        self._data_planes: dict[frozenset[int], dict[int, str]] = {}
        self._arenas: dict[frozenset[int], ExchangeMemory] = {}
        self._connecting: _Connection | None = None
        self._lock = threading.Lock()
        self._relay: Relay | None = None
        self._abandoned: list[object] = []
        """Clients of services that died, and their relays: ending either would end this process."""

    def join(self, address: str, rank: int, process_ids: Mapping[int, int], processes: int) -> None:
        """Enter the generation at `address` as process `process_ids[rank]` of `processes`, leaving the one before.
        JAX's client does not come back from a service that ends meanwhile: this process is ended then.

        Every array of the old generation's backend is gone afterwards; copy to the host first.
        """
        import jax
        import jax.extend.backend
        from jax._src import dispatch, distributed

        state = distributed.global_state
        if self._devices:
            # JAX's caches keep the old client alive; left connected, it would end the process with its service.
            self._leave()
            # Exchanges through shared memory leave tokens behind; that of one that was aborted would raise for ever.
            dispatch.runtime_tokens.clear()
            jax.clear_caches()
            jax.extend.backend.clear_backends()
            state.client = None
        self._relay = relay = Relay(address, lost=_end_unless_held)
        with self._lock:
            self._data_planes.clear()
            self._close_arenas(self._arenas)
        state.coordinator_address = address
        state.process_id = process_ids[rank]
        state.num_processes = processes
        state.client = _connect(self._relay.address, state.process_id)
        self._processes = {d.process_index: d for d in jax.devices()}
        self._devices = {r: self._processes[process_id] for r, process_id in process_ids.items()}
        relay.hold()

    def set_process_id(self, rank: int, process_id: int) -> None:
        """Make `rank` that process of the generation; communicators with its predecessor are dropped."""
        with self._lock:
            self._data_planes = {ranks: plane for ranks, plane in self._data_planes.items() if rank not in ranks}
            self._close_arenas(ranks for ranks in self._arenas if rank in ranks)
        self._devices[rank] = self._processes[process_id]

    def devices(self, ranks: Iterable[int]) -> list:
        """The devices of these ranks, in that order."""
        return [self._devices[r] for r in ranks]

    def connecting(self, ranks: Iterable[int], arena: ExchangeMemory | None = None) -> "_Connection":
        """A context in which the communicator of `ranks` is made: the sockets that appear are its data plane, and the
        arena, if any, is the memory of its exchange."""
        return _Connection(self, frozenset(ranks), arena)

    def use(self, ranks: Iterable[int]) -> None:
        """Make the mesh of these ranks the one whose exchange the following steps use."""
        arena = self._arenas.get(frozenset(ranks))
        if arena is not None:
            arena.use()

    def abort(self, ranks: Iterable[int]) -> int:
        """Shut down the sockets and the exchange of one communicator, so that both ends see the end of the stream and
        no collective waits for a timeout. Returns how many sockets were shut down. Safe from any thread, at any
        time."""
        with self._lock:
            arena = self._arenas.get(frozenset(ranks))
            if arena is not None:
                arena.abort()
            return _shut_down(self._data_planes.pop(frozenset(ranks), {}))

    def abort_connecting(self) -> None:
        """Abort the communicator that is being connected, if any: one of its members is dead.

        Where XLA connects, only leaving the coordination service ends the wait for the dead member, so this process
        cannot connect again in this generation; connected meshes keep working. Safe from any thread, at any time.
        """
        with self._lock:
            if self._connecting is None:
                return
            if self._connecting.arena is not None:
                self._connecting.arena.abort()
            else:
                self._leave()
                _shut_down(self._connecting.appeared())

    def _leave(self) -> None:
        from jax._src import distributed

        relay, self._relay = self._relay, None
        if relay is None:
            return
        if relay.silent:  # shutting down would fail, and that ends the process
            self._abandoned.append((distributed.global_state.client, relay))
        else:
            client = distributed.global_state.client
            assert client is not None, "a relay belongs to a client"
            client.shutdown()
            relay.close()

    def _begin_connecting(self, connecting: "_Connection") -> None:
        with self._lock:
            self._connecting = connecting

    def _close_arenas(self, ranks: Iterable[frozenset[int]]) -> None:
        for each in list(ranks):
            self._arenas.pop(each).close()

    def _connected(self, ranks: frozenset[int], plane: dict[int, str], arena: ExchangeMemory | None) -> None:
        with self._lock:
            self._connecting = None
            if arena is not None:
                self._close_arenas({ranks} & self._arenas.keys())
                self._arenas[ranks] = arena
            self._data_planes.setdefault(ranks, {}).update(plane)


def _native() -> Any:
    """The native module of jaxlib: it has no types. Importing it does not import jax."""
    return importlib.import_module("jaxlib._jax")


def _shut_down(plane: Mapping[int, str]) -> int:
    """Shut down sockets, given by descriptor and inode; returns how many of them were still open."""
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


def _end_unless_held(relay: Relay) -> None:
    """The coordination service has ended. A rank that was about to have entered goes on; one that waits in JAX's client
    would be ended by it after a minute, and is ended now."""
    time.sleep(ENTER_S)
    if not (relay.holding or relay.closed):
        print("the coordination service has ended while this rank entered its generation", file=sys.stderr, flush=True)
        os._exit(1)


def _connect(address: str, process: int) -> Any:
    """A client of the coordination service, registered. Waits for all processes of the generation the first time."""
    client = _native().get_distributed_runtime_client(
        address, process, init_timeout=60, use_compression=True, heartbeat_timeout=HEARTBEAT_TIMEOUT_S
    )
    client.connect()
    return client


class _Connection:
    def __init__(self, world: World, ranks: frozenset[int], arena: ExchangeMemory | None) -> None:
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
