"""Children of this process, however they came to be."""

import os
import signal
from typing import Protocol


class ProcessHandle(Protocol):
    """A process as its parent can query it; `subprocess.Popen` is one."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        ...

    def wait(self) -> int:
        """As `poll`, after waiting for its end."""
        ...


class ChildHandle(ProcessHandle, Protocol):
    """A child of this process."""

    def send_signal(self, sig: int) -> None:
        """Send it a signal by number, unless it has ended."""
        ...

    def kill(self) -> None:
        """Send it SIGKILL, unless it has ended."""
        ...


class AdoptedProcess:
    """A child of this process that another one forked; see `ChildHandle`."""

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

    def send_signal(self, sig: int) -> None:
        """See `ChildHandle.send_signal`."""
        if self.poll() is None:
            os.kill(self.pid, sig)

    def kill(self) -> None:
        """See `ChildHandle.kill`."""
        self.send_signal(signal.SIGKILL)

    def _reap(self, options: int) -> int | None:
        if self._code is None:
            try:
                pid, status = os.waitpid(self.pid, options)
            except ChildProcessError:
                if self._code is None:  # else a handler of signals has asked meanwhile
                    raise
            else:
                self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code
