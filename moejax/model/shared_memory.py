"""The exchange between ranks that are processes of one machine, through memory they have all mapped.

The native side is `moejax/ops/cpu/shared.cc`.

On a CPU the collectives of XLA send each part through a socket and four threads; here a part is written once and read
once, and a rank that waits is woken once.
"""

import ctypes
import os
from typing import ClassVar

from moejax.ops import cpu


class Arena:
    """One rank's end of the exchange of a mesh. `path` names a file in memory that all ranks of the mesh open;
    `outbox_bytes` is the most that a rank sends at once. Raises OSError."""

    _in_use: ClassVar["Arena | None"] = None

    def __init__(self, path: str, *, ranks: int, me: int, outbox_bytes: int, timeout_s: int) -> None:
        self._library = cpu.library()
        self._library.moejax_arena_open.restype = ctypes.c_void_p
        file = os.open(path, os.O_RDWR)
        try:
            sizes = (ctypes.c_int64(size) for size in (outbox_bytes, ranks, me, timeout_s))
            opened = self._library.moejax_arena_open(file, *sizes)
        finally:
            os.close(file)
        if opened is None:
            raise OSError(ctypes.get_errno(), f"{os.strerror(ctypes.get_errno())}: shared memory {path}")
        self._arena: ctypes.c_void_p | None = ctypes.c_void_p(opened)

    def use(self) -> None:
        """Send all exchanges of this process through this arena from now on. Between steps only."""
        if Arena._in_use is not self:  # each call gives up the interpreter's lock, and would do so in every step
            self._library.moejax_arena_use(self._arena)
            Arena._in_use = self

    def abort(self) -> None:
        """Make every wait in this arena fail, now and later. From any thread."""
        self._library.moejax_arena_abort(self._arena)

    def close(self) -> None:
        """Unmap the memory. Between steps only; nothing else may be called afterwards."""
        arena, self._arena = self._arena, None
        if Arena._in_use is self:
            Arena._in_use = None
        if arena is not None:
            self._library.moejax_arena_close(arena)
