"""Memory that ranks of this machine share for an exchange."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def shared_file() -> Iterator[str]:
    """The path of an empty file in memory that processes of this user can open meanwhile. It has no name that could
    outlive this process, and lasts as long as somebody has mapped it."""
    descriptor = os.memfd_create("moejax-exchange")
    try:
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)
