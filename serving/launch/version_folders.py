"""The folders of weights that were made of changed tensors, and of tensors that are being received.

They lie beside the record of the weights in force, and are removed once no version needs them.
"""

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Collection
from pathlib import Path

INCOMING = "incoming-"
"""Beginning of the name of a folder of tensors that a process receives; its process id follows."""


class VersionFolders:
    """The folders in one place; with `place` None in a temporary one, which `close` removes."""

    def __init__(self, place: Path | None) -> None:
        self._place = place
        self._temporary: Path | None = None

    def place(self) -> Path:
        """The folder of these folders, made if need be, for this user alone. Raises OSError."""
        if self._place is None:
            self._temporary = self._temporary or Path(tempfile.mkdtemp(prefix="moejax-versions-"))
            return self._temporary
        self._place.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self._place

    def of_version(self, number: int) -> Path:
        """Where the folder of a version is to be made. No front before this one has made one of that name."""
        return self.place() / f"version-{number}-{os.getpid()}"

    @property
    def exist(self) -> bool:
        """Whether there may be any."""
        place = self._temporary or self._place
        return place is not None and place.is_dir()

    def remove_unneeded(self, needed: Collection[str]) -> None:
        """Remove all folders but these, and those of tensors that a living process receives."""
        place = self._temporary or self._place
        if place is None or not self.exist:
            return
        for each in list(place.iterdir()):
            if str(each) not in needed and not _is_received(each.name):
                shutil.rmtree(each, ignore_errors=True)

    def close(self) -> None:
        """Remove the temporary folder."""
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)


@contextlib.asynccontextmanager
async def incoming_folder(place: str) -> AsyncIterator[Path]:
    """A folder for tensors that this process receives, until the context is left. Raises OSError."""
    folder = Path(tempfile.mkdtemp(prefix=f"{INCOMING}{os.getpid()}-", dir=place))
    try:
        yield folder
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)  # files of a model take their time


def _is_received(name: str) -> bool:
    pid = name.removeprefix(INCOMING).partition("-")[0]
    return name.startswith(INCOMING) and Path("/proc", pid).exists()
