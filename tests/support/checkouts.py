"""Copies of this checkout with other code, for tests of upgrades."""

import shutil
from pathlib import Path

from tests.support.processes import ROOT

PACKAGES = ("serving", "moejax", "planner", "configs")


def copy_checkout(folder: Path, **changes: tuple[str, str]) -> Path:
    """A copy in a folder that is not there yet, whose build differs. `changes` has a text to be replaced and the other
    one by the name of the file, with dots for slashes: each text must be there once."""
    for name in PACKAGES:  # with what Python has compiled of them, which each process of the copy would make otherwise
        shutil.copytree(ROOT / name, folder / name)
    version = folder / "serving" / "version.py"
    _rewrite(version, f'{version.read_text()}\nCOPY = "{folder.name}"\n')
    for name, (before, after) in changes.items():
        file = folder / f"{name.replace('.', '/')}.py"
        text = file.read_text()
        assert text.count(before) == 1, f"{before!r} is {text.count(before)} times in {file}"
        _rewrite(file, text.replace(before, after))
    return folder


def _rewrite(file: Path, text: str) -> None:
    """Write a file, and forget what Python has compiled of it: two versions may have one time and one size."""
    file.write_text(text)
    for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
        compiled.unlink()
