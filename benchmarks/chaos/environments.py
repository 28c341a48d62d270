"""Makes an environment of its own for a server, from the name and version of its package."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from moejax.checkpoint.download import cache_folder


def environment(package: str, version: str, *, without: Sequence[str] = ()) -> Path:
    """The folder of a virtual environment with this package, made on first use in the cache. Its `bin/python` runs it.
    `without` are packages that it installs and does not need, which are removed.

    Raises RuntimeError with the installer's last lines when the package cannot be installed here.
    """
    folder = cache_folder() / "envs" / f"{package}-{version}"
    stamp = folder / ".installed"
    if stamp.exists():
        return folder
    print(f"installing {package} {version} into an environment of its own, once", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*pip, f"{package}=={version}"], capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise RuntimeError(f"{package} {version} cannot be installed for {sys.executable}:\n{last}")
    if without:
        subprocess.run([*pip[:3], "uninstall", "--quiet", "--yes", *without], check=True)
    stamp.touch()
    return folder


def without_python_path() -> dict[str, str]:
    """This process's environment for a program of another environment, which must find its own packages alone."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
