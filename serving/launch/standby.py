"""The next front: a process that has made all imports and waits for the order to serve."""

import contextlib
import subprocess

from serving.launch.code import Code
from serving.launch.run_folder import ENV_RUN, RunFolder


class Standby:
    """The standby front of one server. It runs `code`, until `use` says otherwise."""

    def __init__(self, run: RunFolder, code: Code) -> None:
        self.code = code
        self._run = run
        self._process: subprocess.Popen[bytes] | None = None

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
        self.prepare()

    def prepare(self) -> None:
        """Start the process, if none runs."""
        if self._process is None or self._process.poll() is not None:
            environment = self.code.environment() | {ENV_RUN: str(self._run.path)}
            self._process = subprocess.Popen(
                self.code.command("serving.cli.front"), env=environment, stdin=subprocess.PIPE
            )

    def serve(self) -> "subprocess.Popen[bytes]":
        """Let the process serve, and return it."""
        self.prepare()
        process, self._process = self._process, None
        assert process is not None
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has just died; its exit status is noticed by the caller
            process.stdin.write(b"\n")
            process.stdin.close()
        return process

    def end(self) -> None:
        """Kill the process, if one waits."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
