"""The next front: a process that has made all imports and waits for the order to serve."""

import contextlib
from typing import BinaryIO

from serving.launch.child import ChildHandle
from serving.launch.code import Code
from serving.launch.forkserver import IMPORTS_S, Forkserver, Order
from serving.launch.run_folder import ENV_RUN, RunFolder

FRONT_PROGRAM = "serving.cli.front"
"""The module whose `main` is a front."""


class Standby:
    """The standby front of one server, forked by a fork server that has FRONT_PROGRAM. It runs the `code` of that one,
    until `use` says otherwise."""

    def __init__(self, run: RunFolder, forkserver: Forkserver) -> None:
        self.code = forkserver.code
        self.pending = False
        """Whether `prepare` is to be called again: the fork server makes its imports."""
        self._run = run
        self._forkserver = forkserver
        self._process: ChildHandle | None = None
        self._input: BinaryIO | None = None

    @property
    def waiting(self) -> bool:
        """Whether the process has made its imports, and can serve."""
        return self._process is not None and self._run.has_noted("waiting", self._process.pid)

    @property
    def exit_code(self) -> int | None:
        """How the process ended, before it was to serve; None while it runs or when none was prepared."""
        return None if self._process is None else self._process.poll()

    def use(self, code: Code) -> None:
        """Run other code: the process that waits is ended, and the next one is prepared at once."""
        self.end()
        self._process, self.code = None, code
        self._forkserver.use(code)
        self.prepare()

    def prepare(self) -> None:
        """Have a process run. It is started by a later call where the fork server has yet to make its imports."""
        if self._process is not None and self._process.poll() is None:
            return
        self._process = None
        if not self.pending:
            self._forkserver.prepare()
        self.pending = self._forkserver.importing
        if not self.pending:
            self._start()

    def prepare_now(self) -> None:
        """As `prepare`, after waiting for the imports of the fork server."""
        if self._process is None or self._process.poll() is not None:
            self._start(IMPORTS_S)

    def serve(self) -> ChildHandle:
        """Let the process serve, and return it."""
        self.prepare_now()
        process, self._process = self._process, None
        assert process is not None
        assert self._input is not None
        with self._input, contextlib.suppress(BrokenPipeError):  # it has just died, which the caller notices
            self._input.write(b"\n")
        return process

    def end(self) -> None:
        """Kill the process, if one waits."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._input is not None:
            self._input.close()

    def _start(self, wait_s: float = 0.0) -> None:
        if self._input is not None:
            self._input.close()
        self.pending = False
        order = Order(module=FRONT_PROGRAM, variables={ENV_RUN: str(self._run.path)})
        self._process, self._input = self._forkserver.start_with_input(order, wait_s=wait_s)
