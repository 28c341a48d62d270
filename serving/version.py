"""The version of moejax."""

import functools
import hashlib
import importlib.metadata
from pathlib import Path

PACKAGES = ("moejax", "planner", "serving")
SOURCES = (".py", ".cc", ".h", ".proto", ".js", ".css", ".html", ".svg", ".toml", ".json")
"""The files of a package that its processes run, compile or send, whether it is installed or a checkout."""


def version() -> str:
    """The installed version of moejax; "source" when it runs from a checkout that is not installed."""
    try:
        return importlib.metadata.version("moejax")
    except importlib.metadata.PackageNotFoundError:
        return "source"


@functools.cache
def build() -> str:
    """The version and a digest of everything that a front, its edges and its ranks run or send."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for file in sorted(each for name in PACKAGES for each in (root / name).rglob("*") if each.suffix in SOURCES):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return f"{version()} ({digest.hexdigest()[:12]})"
