"""A process that has imported a program and forks it, which takes milliseconds where the imports take seconds.

    python -m serving.launch.forkserver MODULE DESCRIPTOR    (started by `Forkserver`)

The processes that it forks are children of the process that asked, not of the fork server, so that they outlive it and
end with their parent. (The fork server of `multiprocessing` is the parent of what it forks.) They share the memory of
the imports. Nothing but imports may have happened in MODULE before its `main` is called: no threads, no devices.
"""

import contextlib
import dataclasses
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import Self

from serving.launch.code import Code
from serving.launch.process import adopting, die_with_parent

ANSWER_S = 1.0
"""Seconds to wait for a fork; then the fork server is held to be stuck."""
_MESSAGE_BYTES = 1 << 17
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "GRPC_VERBOSITY": "NONE"}
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}  # else NumPy starts threads when it is imported


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """A process to fork: what is added to its environment, and the file that its output goes to."""

    variables: Mapping[str, str]
    log: str

    @classmethod
    def of(cls, message: bytes) -> Self:
        """The inverse of `message`."""
        return cls(**json.loads(message))

    def message(self) -> bytes:
        """As it is sent."""
        return json.dumps(dataclasses.asdict(self)).encode()


class Forkserver:
    """Forks processes that run the function `main` of a module of `code`, as children of this process. The fork server
    is started by `prepare`, and again after it has died."""

    def __init__(self, module: str, code: Code | None = None) -> None:
        self.module = module
        self.code = code or Code.own()
        self._process: subprocess.Popen[bytes] | None = None
        self._orders: socket.socket | None = None
        self._ready = False

    def prepare(self) -> None:
        """Start the fork server, unless it runs. Returns at once."""
        if self._process is not None and self._process.poll() is None:
            return
        self.end()
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                self.code.command(__name__, self.module, str(theirs.fileno())),
                env={**_ONE_THREAD, **self.code.environment(), **QUIET},
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )

    def fork(self, order: Order, *, wait_s: float = 0.0) -> "AdoptedProcess | None":
        """Start a process. None when the fork server has not made its imports within `wait_s` seconds, or does not
        answer: the caller starts the process otherwise, and the next fork server is prepared meanwhile."""
        self.prepare()
        if not self._is_ready(wait_s):
            return None
        assert self._orders is not None
        try:
            self._orders.settimeout(ANSWER_S)
            with adopting():
                self._orders.send(order.message())
                return AdoptedProcess(int(self._orders.recv(_MESSAGE_BYTES)))
        except (OSError, ValueError):  # it has died, or is stuck
            self.end()
            self.prepare()
            return None

    def end(self) -> None:
        """Kill the fork server. What it has forked goes on."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._orders is not None:
            self._orders.close()
        self._process = self._orders = None
        self._ready = False

    def _is_ready(self, wait_s: float) -> bool:
        if not self._ready and self._orders is not None:
            self._orders.settimeout(wait_s)
            with contextlib.suppress(OSError):
                self._ready = bool(self._orders.recv(_MESSAGE_BYTES))
        return self._ready


class AdoptedProcess:
    """A child of this process that another one forked; see `serving.launch.rank_process.ProcessHandle`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """See `ProcessHandle.poll`."""
        return self._reap(os.WNOHANG)

    def wait(self) -> int:
        """See `ProcessHandle.wait`."""
        code = self._reap(0)
        assert code is not None, "waitpid without WNOHANG returns when the process has ended"
        return code

    def kill(self) -> None:
        """Send it SIGKILL, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _reap(self, options: int) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, options)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code


def _fork_on_order(orders: socket.socket) -> Order | None:
    """Fork a process for each message. Returns in a forked process, with its order, or when nobody can ask any more."""
    owner = os.getppid()
    while message := orders.recv(_MESSAGE_BYTES):
        (adopted, adopt), (pids, pid) = os.pipe(), os.pipe()
        between = os.fork()  # what it forks is given to the owner when it ends
        if between == 0:
            child = os.fork()
            if child != 0:
                os.write(pid, str(child).encode())
                os._exit(0)
            orders.close()
            os.close(adopt)
            os.read(adopted, 1)  # returns when the fork server has closed its end
            if os.getppid() != owner:
                os._exit(1)
            for descriptor in (adopted, pids, pid):
                os.close(descriptor)
            return Order.of(message)
        os.waitpid(between, 0)
        orders.send(os.read(pids, _MESSAGE_BYTES))
        for descriptor in (adopted, adopt, pids, pid):
            os.close(descriptor)
    return None


def main() -> None:
    """Import the module, then fork whenever the owner asks. In a forked process, run it."""
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a terminal or systemd signals the whole group; the owner decides
    name, descriptor = sys.argv[1:]
    orders = socket.socket(fileno=int(descriptor))
    module = importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else the next collection copies what the processes share
    orders.send(b"ready")
    order = _fork_on_order(orders)
    if order is None:
        return
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.environ.update(order.variables)
    out = os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for standard in (1, 2):
        os.dup2(out, standard)
    os.close(out)
    sys.argv = [str(module.__file__)]
    module.main()


if __name__ == "__main__":
    main()
