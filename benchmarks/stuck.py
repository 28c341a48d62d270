"""A program that is stuck: its main thread is held by ptrace, as if it never came back. The process is
not stopped, and its other threads go on."""

import ctypes
import os
import time

_SEIZE, _INTERRUPT = 0x4206, 0x4207
_ALL_THREADS = 0x40000000
"""__WALL, for waitpid."""
_END_LIMIT_S = 30.0


class StuckProgram:
    """A process of this user whose main thread is held until the process ends. The thread that made this must also
    release it. Raises OSError where ptrace is not allowed."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._ptrace = ctypes.CDLL(None, use_errno=True).ptrace
        self._ptrace.argtypes = [ctypes.c_long] * 4
        self._ptrace.restype = ctypes.c_long
        for request in (_SEIZE, _INTERRUPT):
            if self._ptrace(request, pid, 0, 0) != 0:
                error = ctypes.get_errno()
                raise OSError(error, f"{os.strerror(error)}: ptrace of process {pid}")

    def release(self) -> None:
        """Take note of the end of the process, which its parent learns of only then. Raises TimeoutError when it has
        not ended."""
        end = time.monotonic() + _END_LIMIT_S
        while time.monotonic() < end:
            try:
                pid, status = os.waitpid(self._pid, os.WNOHANG | _ALL_THREADS)
            except ChildProcessError:
                return
            if pid and (os.WIFSIGNALED(status) or os.WIFEXITED(status)):
                return
            time.sleep(0.01)
        raise TimeoutError(f"process {self._pid} was not ended within {_END_LIMIT_S:.0f} s")
