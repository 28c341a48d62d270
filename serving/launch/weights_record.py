"""The record of the weights in force, in a file that outlives the front: a switch is decided once it is written.

It stands in the folder of the journal that the settings name, else in the run folder of a supervised front. It is void
when the server is started with another model.
"""

import json
import os
from collections.abc import Collection
from pathlib import Path

from serving.errors import StartError
from serving.launch.version_folders import VersionFolders
from serving.protocol.weights import FIRST_WEIGHTS, WeightsVersion

FILE = "weights.json"
VERSIONS = "weights"
"""Folder beside it of the versions that were made of changed tensors."""


class WeightsRecord:
    """The record in one folder; with `folder` None nothing outlives the front. `base` is the digest of the weights that
    the server was started with."""

    def __init__(self, folder: Path | None, base: str) -> None:
        self._path = None if folder is None else folder / FILE
        self._base = base
        self.versions = VersionFolders(None if folder is None else folder / VERSIONS)
        """The folders of versions that were made of changed tensors."""

    def load(self) -> WeightsVersion:
        """The version in force; that of number 0 without a record. Raises StartError when the file is not readable."""
        if self._path is None or not self._path.is_file():
            return FIRST_WEIGHTS
        try:
            value = json.loads(self._path.read_text())
            return WeightsVersion.from_json(value["version"]) if value["base"] == self._base else FIRST_WEIGHTS
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StartError(
                f"{self._path}, which names the weights in force, cannot be read ({error}). Delete it to serve the "
                "weights of --model."
            ) from error

    def save(self, version: WeightsVersion) -> None:
        """Replace the record. Returns when the disk has it. Raises OSError; see then which one it `has`."""
        if self._path is not None:
            write_whole(self._path, json.dumps({"base": self._base, "version": version.to_json()}).encode())

    def remove_unneeded(self, needed: Collection[str] = ()) -> None:
        """Remove the folders of versions but these and the recorded one, whichever model it is of."""
        recorded = ""
        if self._path is not None and self._path.is_file():
            try:
                recorded = str(json.loads(self._path.read_text())["version"]["model"])
            except (OSError, ValueError, TypeError, KeyError):
                return  # nobody knows which one is needed
        self.versions.remove_unneeded({*needed, recorded})

    def has(self, version: WeightsVersion) -> bool:
        """Whether the next front would have this version in force."""
        try:
            return self.load() == version
        except StartError:
            return False


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file, atomically. Raises OSError with the old file in place, or with the new one where only the folder
    could not be flushed to the disk."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
