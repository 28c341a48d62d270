"""The copies of models in the host's memory: made once, shared by all ranks, bounded in size, pruned when idle.

    /dev/shm/moejax-<uid>/<model>-<content hash>/     one copy; only this user may read it
        in-use                                        every reader holds a shared lock on it while it lives

The kernel drops a lock with its process, so a copy that nobody could lock is idle. Idle copies go when another version
of their model is copied, and, the longest unused first, when room is needed. A copy is kept for some minutes after its
last use, as long as a server may take between making it and opening it.
"""

import contextlib
import dataclasses
import fcntl
import os
import re
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from moejax.config import ModelConfig
from moejax.manifest import FILE, CheckpointError, content_hash
from moejax.store_errors import StoreMissing, StoreRefused

TMPFS = Path("/dev/shm")
LIMIT = "MOEJAX_STORE_MIB"
"""Environment variable: the size of all copies together. Half of tmpfs unless given."""
LEASE = "in-use"
FRESH_S = 600.0
_VERSION = re.compile(r"(.+)-[0-9a-f]{16}")


@dataclasses.dataclass(frozen=True)
class Copy:
    """One copy: its bytes, when it was last used (seconds since 1970), and whether a process reads it now."""

    folder: Path
    bytes: int
    used: float
    busy: bool

    @property
    def idle(self) -> bool:
        """True if it may go."""
        return not self.busy and time.time() - self.used > FRESH_S


def ensure_copy(model_folder: Path, place: Path | None = None) -> Path:
    """The folder to read a model's weights from: its copy, made now if need be, or `model_folder` itself.

    The latter, with a warning, where the copy would be too large for the bound on all copies, for tmpfs, or for half
    of the memory that is free. Raises StoreRefused for a folder of another owner, CheckpointError when copying fails.
    """
    if place is None:
        name = ModelConfig.load(model_folder).name
        place = TMPFS / f"moejax-{os.getuid()}" / f"{name}-{content_hash(model_folder)}"
    parent = place.parent
    if not parent.parent.is_dir():
        warnings.warn(f"{parent.parent} does not exist; reading {model_folder}.", stacklevel=3)
        return model_folder
    _private(parent)
    with _alone(parent):
        _remove_drafts(parent)
        _remove(copy.folder for copy in list_copies(parent) if copy.idle and _is_other_version(copy.folder, place))
        sizes = _sizes(model_folder)
        if place.is_dir() and _sizes(place) == sizes:
            (place / LEASE).touch()
            return place
        needed, room = sum(sizes.values()), _make_room(parent, sum(sizes.values()), place)
        if room < needed:
            warnings.warn(
                f"{parent} has room for {room >> 20} MiB, the weights need {needed >> 20} MiB; reading {model_folder}, "
                f"so experts will be recovered at the speed of that disk. {LIMIT} bounds all copies together.",
                stacklevel=3,
            )
            return model_folder
        _copy(model_folder, place, list(sizes))
        return place


def lease(folder: Path) -> IO[str] | None:
    """Hold a copy in use until the returned file is closed. None for a folder that is no copy.

    Raises StoreMissing when it was removed in this moment.
    """
    path = folder / LEASE
    if not path.is_file():
        return None
    held = path.open("r+")
    try:
        fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.utime(path)
    except OSError:
        held.close()
        raise StoreMissing(f"{folder} is being removed; start again.") from None
    return held


def list_copies(parent: Path) -> list[Copy]:
    """All copies in a folder, the longest unused first."""
    found = []
    for folder in (each for each in parent.iterdir() if each.is_dir() and not each.name.startswith(".")):
        path = folder / LEASE
        with contextlib.suppress(FileNotFoundError):
            if not path.is_file():
                path.touch()  # made before there were leases: taken for used now
            found.append(Copy(folder, _bytes(folder), path.stat().st_mtime, _is_busy(path)))
    return sorted(found, key=lambda copy: copy.used)


def _make_room(parent: Path, needed: int, place: Path) -> int:
    """Bytes that a new copy may have, after removing idle ones as far as that helps."""
    for copy in list_copies(parent):
        if copy.folder == place or _room(parent) >= needed:
            continue
        if copy.idle:
            _remove([copy.folder])
    return _room(parent)


def _room(parent: Path) -> int:
    usage = shutil.disk_usage(parent)
    given = os.environ.get(LIMIT, "")
    limit = int(given) << 20 if given.isdecimal() else usage.total // 2
    return max(0, min(limit - sum(copy.bytes for copy in list_copies(parent)), usage.free, _free_memory() // 2))


def _free_memory() -> int:
    """Bytes of memory that can be had without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


def _is_other_version(folder: Path, place: Path) -> bool:
    ours, theirs = _VERSION.fullmatch(place.name), _VERSION.fullmatch(folder.name)
    return bool(ours and theirs and ours[1] == theirs[1] and folder != place)


def _is_busy(path: Path) -> bool:
    with path.open("r+") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _remove(folders: Iterator[Path] | list[Path]) -> None:
    """Remove copies that nobody has opened in the meantime."""
    for folder in folders:
        with contextlib.suppress(OSError), (folder / LEASE).open("r+") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


def _remove_drafts(parent: Path) -> None:
    """What copies that were killed have left: nobody else copies now."""
    for draft in parent.glob(".draft-*"):
        shutil.rmtree(draft, ignore_errors=True)


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file the store needs, by path within the model folder."""
    files = [folder / "config.json", folder / FILE, *(folder / "params").rglob("*")]
    return {str(f.relative_to(folder)): f.stat().st_size for f in files if f.is_file()}


def _bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def _private(folder: Path) -> None:
    """Make a folder for this user alone, or raise StoreRefused when another could have put files in it."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise StoreRefused(
            f"{folder} has owner {found.st_uid} and mode {stat.filemode(found.st_mode)}; it must be a "
            f"folder of user {os.getuid()} with mode drwx------. Delete it, or give another place."
        )


@contextlib.contextmanager
def _alone(parent: Path) -> Iterator[None]:
    """One process copies and prunes at a time; others wait for it and find its copy."""
    with (parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _copy(model_folder: Path, place: Path, files: list[str]) -> None:
    """Copy into a draft and rename: a reader sees all of it or nothing."""
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=place.parent))
    try:
        for file in files:
            (draft / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(model_folder / file, draft / file)
        (draft / LEASE).touch()
        if place.is_dir():
            shutil.rmtree(place)
        os.rename(draft, place)
    except OSError as error:
        raise CheckpointError(f"{model_folder} cannot be copied to {place}: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
