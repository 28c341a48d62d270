"""A rank's process as the front sees it, and the processes of ranks on the front's own machine.

A process on this machine is a child of the front, or of the supervisor (`serving.launch.supervised`). A rank on a
joined host is a process of that host's agent (`serving.launch.host_pool`).
"""

import asyncio
import contextlib
import dataclasses
import os
import secrets
import signal
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, Self

from serving.launch.child import ChildHandle, ProcessHandle
from serving.launch.forkserver import IMPORTS_S, Forkserver, Order
from serving.launch.last_words import last_words
from serving.launch.run_delay import run_delay_s

RANK_PROGRAM = "serving.worker.main"
"""The module whose `main` is a rank."""
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "GRPC_VERBOSITY": "NONE"}
"""Environment variables that keep a rank from writing about JAX and gRPC."""
FENCE_POLL_S = 0.001
PF_EXITING = 0x4
"""A flag in /proc/PID/stat (linux/sched.h): the process has begun to exit."""

ENV_FRONT, ENV_RANK, ENV_TOKEN = "MOEJAX_LINK_FRONT", "MOEJAX_LINK_RANK", "MOEJAX_LINK_TOKEN"
"""Environment variables of a rank: where its front listens, its number, and the secret that proves who it is."""
ENV_STAY = "MOEJAX_LINK_STAY"
"""Environment variable of a rank that dials the next front when its front has died, instead of ending."""

OnExit = Callable[[str], None]
"""Called once with how a process ended."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostPaths:
    """A joined host as a rank there needs it: its fault domains, its copy of the weights and its compiled programs.
    Slots with the same `disk` share the compiled programs: what one of them has compiled, the others find."""

    host: str
    rack: str
    store: str
    executables: str
    disk: str


class RankProcess(Protocol):
    """One incarnation of a rank, from its start to its end. It proves who it is with `token`, once. `host_paths` is
    None for a rank on the front's own machine."""

    token: str
    host_paths: HostPaths | None

    @property
    def pid(self) -> int | None:
        """Its process id on its machine; None before it is known."""
        ...

    @property
    def state(self) -> str:
        """The kernel's letter for its state: now on this machine, as last reported by the host agent on another host.
        "" before it is known."""
        ...

    @property
    def exit_code(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs, or when nobody knows."""
        ...

    def run_delay_s(self) -> float | None:
        """Seconds for which its threads together have waited for a processor, since its start: now on this machine, as
        last reported by the host agent on another host. None when nobody knows."""
        ...

    def signal(self, name: str) -> None:
        """Send it a signal by name. Does nothing when it has ended."""
        ...

    async def fenced(self) -> None:
        """Wait until it runs no more of its program, or whatever it still does reaches no other process."""
        ...

    def last_output(self) -> str:
        """The last lines it wrote."""
        ...

    def end(self) -> None:
        """Kill it and remove what it leaves behind. `OnExit` is not called for that."""
        ...


class RankStarter(Protocol):
    """Starts rank processes."""

    def start(self, rank: int, front: str, on_exit: OnExit) -> RankProcess:
        """Start one more incarnation of a rank, which will dial `front` (host:port). Returns at once."""
        ...

    def orphans(self) -> Mapping[int, Callable[[OnExit], RankProcess]]:
        """Ranks that an earlier front left running, each as a function that takes it over."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchSpec:
    """How to start a rank's process. `variables` are added to the environment of the process that starts it; its output
    goes to the file `log`."""

    rank: int
    token: str
    log: str
    variables: Mapping[str, str]

    @classmethod
    def of(
        cls,
        rank: int,
        front: str,
        folder: Path,
        threads: int,
        token: str = "",
        variables: Mapping[str, str] | None = None,
    ) -> Self:
        """A spec for a rank that dials `front` and computes with `threads` threads, with a new log in `folder`. Without
        a token it gets a new one."""
        descriptor, log = tempfile.mkstemp(prefix=f"rank{rank}-", suffix=".log", dir=folder)
        os.close(descriptor)
        token = token or secrets.token_hex(16)
        link = {ENV_FRONT: front, ENV_RANK: str(rank), ENV_TOKEN: token, "NPROC": str(threads)}
        return cls(rank=rank, token=token, log=log, variables={**(variables or {}), **link, **QUIET})

    def start(self, forkserver: Forkserver, *, wait_s: float = 0.0) -> ChildHandle:
        """Start the process as a child of this one, by the fork server of RANK_PROGRAM; see `Forkserver.start`."""
        return forkserver.start(Order(variables=self.variables, log=self.log), wait_s=wait_s)


def rank_forkserver() -> Forkserver:
    """A fork server of RANK_PROGRAM."""
    return Forkserver(RANK_PROGRAM, variables=QUIET)


def describe_exit(code: int | None, output: str) -> str:
    """How a process ended, with its last output unless it was killed: then that says nothing."""
    how = f"signal {-code}" if code is not None and code < 0 else f"code {code}"
    return f"process ended with {how}" + ("" if code == -signal.SIGKILL or not output else f": {output}")


class LocalStarter:
    """Starts ranks as children of this process. Their output goes to files in `folder`."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._folder = folder
        self._threads = threads
        self._forkserver = rank_forkserver()
        self._started = False

    def start(self, rank: int, front: str, on_exit: OnExit) -> RankProcess:
        """See `RankStarter.start`."""
        spec = LaunchSpec.of(rank, front, self._folder, self._threads)
        wait_s, self._started = 0.0 if self._started else IMPORTS_S, True
        return ChildProcess(spec.start(self._forkserver, wait_s=wait_s), spec, on_exit)

    def stop(self) -> None:
        """End what is left of this server when its ranks have ended."""
        self._forkserver.end()

    def orphans(self) -> Mapping[int, Callable[[OnExit], RankProcess]]:
        """No ranks: children end with their parent."""
        return {}


class ChildProcess:
    """A rank's process on this machine; see `RankProcess`."""

    host_paths: HostPaths | None = None

    def __init__(self, process: ProcessHandle, spec: LaunchSpec, on_exit: OnExit) -> None:
        self.token = spec.token
        self._on_exit = on_exit
        self._code: int | None = None
        self._log = Path(spec.log)
        self._output: str | None = None
        """Its last output, once it has ended: the log is removed then."""
        self._process = process
        self._pidfd = os.pidfd_open(process.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._exited)

    @property
    def pid(self) -> int:
        """See `RankProcess.pid`."""
        return self._process.pid

    @property
    def state(self) -> str:
        """See `RankProcess.state`. X already when the process has begun to exit: the kernel informs its parent only
        after it has freed all of its memory, which takes longer than the rest of a recovery."""
        fields = self._stat()
        return "" if not fields else "X" if int(fields[6]) & PF_EXITING else fields[0]

    @property
    def exit_code(self) -> int | None:
        """See `RankProcess.exit_code`. Known as soon as the process begins to exit."""
        if self._code is not None:
            return self._code
        fields = self._stat()
        ended = bool(fields) and (fields[0] == "Z" or int(fields[6]) & PF_EXITING != 0)
        return os.waitstatus_to_exitcode(int(fields[-1])) if ended else None

    @property
    def code(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        return self._process.poll()

    def run_delay_s(self) -> float | None:
        """See `RankProcess.run_delay_s`."""
        return run_delay_s(self.pid) if self._pidfd >= 0 else None

    def signal(self, name: str) -> None:
        """See `RankProcess.signal`."""
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self._pidfd, getattr(signal, name))

    async def fenced(self) -> None:
        """See `RankProcess.fenced`. The kernel may still be freeing its memory afterwards."""
        while self.state not in ("Z", "X", ""):
            await asyncio.sleep(FENCE_POLL_S)

    def last_output(self) -> str:
        """See `RankProcess.last_output`."""
        if self._output is not None:
            return self._output
        lines = self._log.read_text(errors="replace").splitlines()
        return last_words([line for line in lines if not line.startswith("[Gloo]")])

    def end(self) -> None:
        """See `RankProcess.end`."""
        self.signal("SIGKILL")
        self._process.wait()
        self._log.unlink(missing_ok=True)
        self._unwatch()

    def _stat(self) -> list[str]:
        """The fields of /proc/PID/stat from the state on; none once the process is gone. The pid may be reused then."""
        if self._pidfd < 0:
            return []
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].split()
        except OSError:
            return []

    def _exited(self) -> None:
        self._code = self._process.poll()
        self._unwatch()
        self._output = self.last_output()
        self._log.unlink(missing_ok=True)
        self._on_exit(describe_exit(self._code, self._output))

    def _unwatch(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
