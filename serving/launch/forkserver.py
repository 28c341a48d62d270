"""A process that has imported programs and forks them, which takes milliseconds where the imports take seconds.

    python -m serving.launch.forkserver MODULE... DESCRIPTOR    (started by `Forkserver`)

The processes that it forks are children of the process that asked, not of the fork server, so that they outlive it and
end with their parent. (The fork server of `multiprocessing` is the parent of what it forks.) They share the memory of
the imports. Nothing but imports may have happened in a MODULE before its `main` is called: no threads, no devices.
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
import time
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, Self

from serving.launch.child import AdoptedProcess, ChildHandle
from serving.launch.code import Code, known_fields
from serving.launch.process import adopting, die_with_parent, set_command_line

IMPORTS_S = 30.0
"""Longest wait for the imports of a fork server, which is held to be stuck then. If it dies, nobody waits."""
ANSWER_S = 5.0
"""Seconds to wait for a fork; then the fork server is held to be stuck."""
_MESSAGE_BYTES = 1 << 17
_MAX_DESCRIPTORS = 8
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}  # else NumPy starts threads when it is imported


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """A process to start. `module` is its program, "" for the first one of the fork server; `variables` are added to
    its environment; its output goes to the file `log`, or, where that is "", to where that of this process goes. It
    gets copies of descriptors: `stdin` as its standard input, and `passed`, whose numbers there are its arguments."""

    variables: Mapping[str, str]
    log: str = ""
    module: str = ""
    stdin: int | None = None
    passed: tuple[int, ...] = ()

    @classmethod
    def of(cls, message: bytes, descriptors: Sequence[int]) -> Self:
        """The inverse of `message` and `descriptors`, in another process, which has the `descriptors`."""
        value: dict[str, Any] = known_fields(cls, json.loads(message))
        if value.pop("stdin", False):
            return cls(**value, stdin=descriptors[0], passed=tuple(descriptors[1:]))
        return cls(**value, passed=tuple(descriptors))

    def message(self) -> bytes:
        """As it is sent. What is not used is left out: the fork server may run code that does not know it."""
        value: dict[str, Any] = {"variables": dict(self.variables), "log": self.log}
        if self.module:
            value["module"] = self.module
        if self.stdin is not None:
            value["stdin"] = True
        return json.dumps(value).encode()

    @property
    def descriptors(self) -> tuple[int, ...]:
        """All descriptors that are sent with the message."""
        return (*(() if self.stdin is None else (self.stdin,)), *self.passed)


class Forkserver:
    """Forks processes that run the function `main` of one of several modules of `code`, as children of this process.
    The fork server is started by `prepare`, and again after it has died; `variables` are added to its environment."""

    def __init__(self, *modules: str, code: Code | None = None, variables: Mapping[str, str] | None = None) -> None:
        self.code = code or Code.own()
        self._modules = modules
        self._variables = variables or {}
        self._process: subprocess.Popen[bytes] | None = None
        self._orders: socket.socket | None = None
        self._ready = False
        self._started_at = 0.0

    @property
    def importing(self) -> bool:
        """Whether the fork server makes its imports, and has done so for less than IMPORTS_S."""
        late = time.monotonic() > self._started_at + IMPORTS_S
        return self._process is not None and self._process.poll() is None and not late and not self._is_ready(0.0)

    def use(self, code: Code) -> None:
        """Fork processes with other code from now on. What was forked goes on."""
        self.end()
        self.code = code

    def prepare(self) -> None:
        """Start the fork server, unless it runs. Returns at once."""
        if self._process is not None and self._process.poll() is None:
            return
        self.end()
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                self.code.command(__name__, *self._modules, str(theirs.fileno())),
                env={**self.code.environment(), **self._variables},
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )
        self._started_at = time.monotonic()

    def start(self, order: Order, *, code: Code | None = None, wait_s: float = 0.0) -> ChildHandle:
        """Start a process as a child of this one. It is forked where the fork server is ready within `wait_s` seconds;
        else, and with other `code` than that of the fork server, it makes its imports itself."""
        forked = self.fork(order, wait_s=wait_s) if code in (None, self.code) else None
        return self._start_alone(order, code or self.code) if forked is None else forked

    def start_with_input(
        self, order: Order, *, code: Code | None = None, wait_s: float = 0.0
    ) -> tuple[ChildHandle, BinaryIO]:
        """As `start`, with a pipe as the standard input of the process. Returns the other end, too."""
        reading, writing = os.pipe()
        pipe = os.fdopen(writing, "wb", buffering=0)
        try:
            return self.start(dataclasses.replace(order, stdin=reading), code=code, wait_s=wait_s), pipe
        except BaseException:
            pipe.close()
            raise
        finally:
            os.close(reading)

    def fork(self, order: Order, *, wait_s: float = 0.0) -> AdoptedProcess | None:
        """Start a process. None when the fork server has not made its imports within `wait_s` seconds, or does not
        answer: the caller starts the process otherwise, and the next fork server is prepared meanwhile."""
        self.prepare()
        if not self._is_ready(wait_s):
            return None
        assert self._orders is not None
        awaited, go = os.pipe()  # what is forked begins only if its pid is known here
        try:
            self._orders.settimeout(ANSWER_S)
            with adopting():
                socket.send_fds(self._orders, [order.message()], [awaited, *order.descriptors])
                process = AdoptedProcess(int(self._orders.recv(_MESSAGE_BYTES)))
                os.write(go, b"1")
                return process
        except (OSError, ValueError):  # it has died, or is stuck
            self.end()
            self.prepare()
            return None
        finally:
            os.close(awaited)
            os.close(go)

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

    def _start_alone(self, order: Order, code: Code) -> "subprocess.Popen[bytes]":
        with contextlib.ExitStack() as stack:
            out = stack.enter_context(open(order.log, "wb")) if order.log else None
            return subprocess.Popen(
                code.command(order.module or self._modules[0], *map(str, order.passed)),
                env={**code.environment(), **order.variables},
                stdin=subprocess.DEVNULL if order.stdin is None else order.stdin,
                stdout=out,
                stderr=out,
                pass_fds=order.passed,
            )


def _fork_on_order(orders: socket.socket) -> Order | None:
    """Fork a process for each message. Returns in a forked process, with its order, or when nobody can ask any more."""
    owner = os.getppid()
    while True:
        message, descriptors, _, _ = socket.recv_fds(orders, _MESSAGE_BYTES, _MAX_DESCRIPTORS)
        if not message:
            return None
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
            awaited, given = descriptors[:1], descriptors[1:]
            known = all(os.read(each, 1) for each in awaited)  # owners of another version send none
            if not known or os.getppid() != owner:
                os._exit(1)
            for descriptor in (adopted, pids, pid, *awaited):
                os.close(descriptor)
            return Order.of(message, given)
        os.waitpid(between, 0)
        orders.send(os.read(pids, _MESSAGE_BYTES))
        for descriptor in (adopted, adopt, pids, pid, *descriptors):
            os.close(descriptor)


def main() -> int | None:
    """Import the modules, then fork whenever the owner asks. In a forked process, run one of them, and return its exit
    status."""
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a terminal or systemd signals the whole group; the owner decides
    *names, descriptor = sys.argv[1:]
    orders = socket.socket(fileno=int(descriptor))
    added = _ONE_THREAD.keys() - os.environ.keys()
    os.environ.update({name: _ONE_THREAD[name] for name in added})
    modules = {name: importlib.import_module(name) for name in names}
    gc.collect()
    gc.freeze()  # else the next collection copies what the processes share
    orders.send(b"ready")
    order = _fork_on_order(orders)
    if order is None:
        return None
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    for name in added:
        del os.environ[name]
    os.environ.update(order.variables)
    _set_streams(order)
    name, arguments = order.module or names[0], [*map(str, order.passed)]
    sys.argv = [str(modules[name].__file__), *arguments]
    set_command_line(sys.orig_argv[0], "-m", name, *arguments)
    return modules[name].main()


def _set_streams(order: Order) -> None:
    if order.log:
        out = os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for standard in (1, 2):
            os.dup2(out, standard)
        os.close(out)
    if order.stdin is not None:
        os.dup2(order.stdin, 0)
        os.close(order.stdin)
        sys.stdin = os.fdopen(0, closefd=False)  # the former one belongs to what was the input before


if __name__ == "__main__":
    raise SystemExit(main())
