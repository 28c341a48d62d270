"""The version of moejax."""

import functools
import hashlib
import importlib.metadata
from pathlib import Path

SOURCES = (".py", ".cc", ".proto")


def version() -> str:
    """The installed version of moejax; "source" when it runs from a checkout that is not installed."""
    try:
        return importlib.metadata.version("moejax")
    except importlib.metadata.PackageNotFoundError:
        return "source"


@functools.cache
def build() -> str:
    """The version and a digest of the sources that a front and its ranks must have in common."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for file in sorted(f for name in ("moejax", "serving") for f in (root / name).rglob("*") if f.suffix in SOURCES):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return f"{version()} ({digest.hexdigest()[:12]})"
