"""The disk of the journal: a folder in memory, which is full for a while when a scenario says so."""

import errno
from pathlib import Path


class Disk:
    """Where the journals of a run are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.full = False
        self.refused = 0
        """Writes that found no room."""

    def check_room(self) -> None:
        """Raises OSError while the disk is full."""
        if self.full:
            self.refused += 1
            raise OSError(errno.ENOSPC, "No space left on device")
