"""Processes of one machine: a child that ends with its parent, children of others, and memory that ranks share."""

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 1, 36, 37


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, at once if the parent has ended already. The setting
    survives exec."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def set_command_line(*arguments: str) -> None:
    """Have `ps` show other arguments than this process was started with, as far as those had room."""
    fields = Path("/proc/self/stat").read_text().rpartition(") ")[2].split()
    start, end = (int(fields[number - 3]) for number in (48, 49))  # proc(5); 0 where the kernel does not say
    if 0 < start < end:
        shown = b"".join(os.fsencode(each) + b"\0" for each in arguments)[: end - start - 1]
        ctypes.memmove(start, shown.ljust(end - start, b"\0"), end - start)


@contextlib.contextmanager
def adopting() -> Iterator[None]:
    """Adopt descendants whose parent ends while the context is entered."""
    prctl, before = ctypes.CDLL(None).prctl, ctypes.c_int()
    prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)


@contextlib.contextmanager
def shared_file() -> Iterator[str]:
    """Yield the path of an empty file in memory, which processes of this user can open while the context is entered.
    The file has no name that could outlive this process, and its memory lasts as long as some process maps it."""
    descriptor = os.memfd_create("moejax-exchange")
    try:
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)
