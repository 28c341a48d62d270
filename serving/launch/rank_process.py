"""A rank's process as the front sees it: what it can know of one, and how it ends one. Here, one of this machine: a
child of this process, or of the supervisor (`serving.supervised`).

`serving.places` has the other kind: a process that a host elsewhere starts and ends when it is told to.
"""

import asyncio
import contextlib
import dataclasses
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, Self

FENCE_POLL_S = 0.001
PF_EXITING = 0x4
"""Of the flags in /proc/PID/stat (linux/sched.h)."""
_SAID_LINES, _SAID_LETTERS = 8, 1000

FRONT, RANK, TOKEN = "MOEJAX_LINK_FRONT", "MOEJAX_LINK_RANK", "MOEJAX_LINK_TOKEN"
"""Environment variables that a rank is started with: where its front listens, who it is, and the proof of it."""
STAY = "MOEJAX_LINK_STAY"
"""Environment variable of a rank that dials again when its front has died, instead of ending."""

Ended = Callable[[str], None]
"""Hears once how a process ended."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Home:
    """A host that is not the front's, as a rank needs it: its fault domains, its copy of the weights, its compiled
    programs. `disk` is the same where those folders are."""

    host: str
    rack: str
    store: str
    executables: str
    disk: str


class RankProcess(Protocol):
    """One incarnation of a rank, from its start to its end. `token` is what it proves itself with, once; `home` is None
    for one on the front's own machine."""

    token: str
    home: Home | None

    @property
    def pid(self) -> int | None:
        """Its number on its machine, if it has one by now."""
        ...

    @property
    def state(self) -> str:
        """The kernel's letter for it, where that can be had; empty elsewhere."""
        ...

    def signal(self, name: str) -> None:
        """Send it a signal, by name; nothing when it has ended."""
        ...

    async def fenced(self) -> None:
        """Wait until it runs no more of its program, or whatever it still does reaches nobody."""
        ...

    def said(self) -> str:
        """The last lines it wrote."""
        ...

    def end(self) -> None:
        """End it for certain and take away what is left of it. Nobody hears of that."""
        ...


class Launcher(Protocol):
    """Starts rank processes."""

    def start(self, rank: int, front: str, ended: Ended) -> RankProcess:
        """One more incarnation of a rank, which is to dial `front` (host:port). Returns at once."""
        ...

    def left(self) -> Mapping[int, Callable[[Ended], RankProcess]]:
        """Ranks that a front before this one left running, each as what takes it over."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """A rank process to be started. `variables` are of its environment, beside those of the process that starts it."""

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
        """For a rank that dials `front`, with a token of its own unless there is one, and a new log in `folder`."""
        descriptor, log = tempfile.mkstemp(prefix=f"rank{rank}-", suffix=".log", dir=folder)
        os.close(descriptor)
        token = token or secrets.token_hex(16)
        told = {FRONT: front, RANK: str(rank), TOKEN: token, "NPROC": str(threads)}
        quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "GRPC_VERBOSITY": "NONE"}
        return cls(rank=rank, token=token, log=log, variables={**(variables or {}), **told, **quiet})

    def start(self) -> "subprocess.Popen[bytes]":
        """Start it as a child of this process."""
        with Path(self.log).open("wb") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "serving.rank"],
                env={**os.environ, **self.variables},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )


class Handle(Protocol):
    """What can be asked of a process where its parent is: here of `subprocess.Popen`."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """Its exit code, or minus the signal; None while it runs."""
        ...

    def wait(self) -> int:
        """As `poll`, once it has ended."""
        ...


class Children:
    """Starts ranks as children of this process. Their output goes to files in `folder`."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._folder = folder
        self._threads = threads

    def start(self, rank: int, front: str, ended: Ended) -> RankProcess:
        """See `Launcher.start`."""
        order = Order.of(rank, front, self._folder, self._threads)
        return Child(order.start(), order, ended)

    def left(self) -> Mapping[int, Callable[[Ended], RankProcess]]:
        """None: they end with their parent."""
        return {}


class Child:
    """A process of this machine; see `RankProcess`."""

    home: Home | None = None

    def __init__(self, process: Handle, order: Order, ended: Ended) -> None:
        self.token = order.token
        self._ended = ended
        self._log = Path(order.log)
        self._said: str | None = None
        """Its last words, once it has ended: the log goes then."""
        self._process = process
        self._pidfd = os.pidfd_open(process.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._exited)

    @property
    def pid(self) -> int:
        """See `RankProcess.pid`."""
        return self._process.pid

    @property
    def state(self) -> str:
        """See `RankProcess.state`. X too when it has begun to end: its parent is told only when all its memory is given
        back, which takes longer than all the rest of a recovery."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].split()
        except OSError:
            return ""
        return "X" if int(fields[6]) & PF_EXITING else fields[0]

    @property
    def code(self) -> int | None:
        """How it ended: its code, or minus the signal."""
        return self._process.poll()

    def signal(self, name: str) -> None:
        """See `RankProcess.signal`."""
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self._pidfd, getattr(signal, name))

    async def fenced(self) -> None:
        """See `RankProcess.fenced`. The kernel may still be giving back its memory."""
        while self._pidfd >= 0 and self.state not in ("Z", "X", ""):  # else its number may be another's by now
            await asyncio.sleep(FENCE_POLL_S)

    def said(self) -> str:
        """See `RankProcess.said`."""
        if self._said is not None:
            return self._said
        lines = self._log.read_text(errors="replace").strip().splitlines()
        told = [line.strip() for line in lines if not line.startswith("[Gloo]")]
        return " | ".join(told[-_SAID_LINES:])[-_SAID_LETTERS:] or "it wrote nothing"

    def end(self) -> None:
        """See `RankProcess.end`."""
        self.signal("SIGKILL")
        self._process.wait()
        self._log.unlink(missing_ok=True)
        self._unwatch()

    def _exited(self) -> None:
        code = self._process.poll()
        self._unwatch()
        how = f"signal {-code}" if code is not None and code < 0 else f"code {code}"
        self._said = self.said()
        self._log.unlink(missing_ok=True)
        said = "" if code == -signal.SIGKILL else f": {self._said}"
        self._ended(f"process ended with {how}{said}")

    def _unwatch(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
