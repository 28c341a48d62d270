"""An environment for each tool, in the cache folder; it is made once, and again when its packages change."""

import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from clients.tool import Tool
from moejax.checkpoint.download import cache_folder

_STAMP = ".made"
_TIMEOUT_S = 1800


class NotInstalled(Exception):
    """A tool cannot be installed on this machine; the text is the reason that its installer gave."""


def environment(tool: Tool) -> Path:
    """The folder with the tool's packages. Raises NotInstalled."""
    folder = cache_folder() / "envs" / tool.key
    stamp, wanted = folder / _STAMP, "\n".join(tool.packages) + "\n"
    if stamp.is_file() and stamp.read_text() == wanted:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if tool.registry == "PyPI":
        _from_pypi(tool, folder)
    if tool.npm:
        _run("npm", "install", "--no-audit", "--no-fund", "--silent", "--prefix", str(folder), *tool.npm)
    if tool.debian:
        _from_debian(tool, folder)
    stamp.write_text(wanted)
    return folder


def interpreter(tool: Tool, folder: Path) -> list[str]:
    """The command that runs the tool's program in its environment."""
    if tool.npm:
        return ["node", str(tool.program)]
    python = folder / "bin" / "python"
    return [str(python if python.exists() else sys.executable), "-m", f"clients.tools.{tool.key}"]


def _from_pypi(tool: Tool, folder: Path) -> None:
    _run(sys.executable, "-m", "venv", str(folder))
    pip = (str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    if tool.partial:
        _run(*pip, "--no-deps", tool.partial)
    needed = (*tool.pypi, *_requirements(tool, folder))
    if needed:
        _run(*pip, *needed)


def _requirements(tool: Tool, folder: Path) -> Iterator[str]:
    """The requirements of the package that is installed without some of them."""
    if not tool.partial or "*" in tool.leave_out:
        return
    package = Requirement(tool.partial)
    (site,) = folder.glob("lib/python*/site-packages")
    (found,) = importlib.metadata.distributions(name=package.name, path=[str(site)])
    for text in found.requires or ():
        each = Requirement(text)
        applies = each.marker is None or any(each.marker.evaluate({"extra": e}) for e in ("", *package.extras))
        if applies and each.name not in tool.leave_out:
            extras = f"[{','.join(sorted(each.extras))}]" if each.extras else ""
            yield f"{each.name}{extras}{each.specifier}"


def _from_debian(tool: Tool, folder: Path) -> None:
    """Unpacks packages without installing them on the machine: no root, and no service is started."""
    _run("apt-get", "download", "-q", *tool.debian, folder=folder)
    for package in folder.glob("*.deb"):
        _run("dpkg", "-x", str(package), str(folder))


def _run(*words: str, folder: Path | None = None) -> None:
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except FileNotFoundError:
        raise NotInstalled(f"this machine has no {words[0]}") from None
    except subprocess.TimeoutExpired:
        raise NotInstalled(f"{words[0]} did not end within {_TIMEOUT_S} s") from None
    if done.returncode != 0:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if "ERROR" in line or line.startswith("E:")] or lines
        raise NotInstalled((errors or ["it ended with an error"])[-1].strip())
