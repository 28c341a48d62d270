"""The code that processes of a server run: a checkout or an installed package, and an interpreter.

`python -m serving.launch.code` prints that of the interpreter which runs it, as JSON.
"""

import asyncio
import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from serving.errors import InvalidRequest
from serving.launch.last_words import last_words
from serving.protocol.versions import PROTOCOLS, VersionRange
from serving.version import build

READ_TIMEOUT_S = 60.0
"""Seconds that an interpreter has to say which code it runs."""
_SAFE_PATH = "PYTHONSAFEPATH"
"""With this variable `python -m` does not look for modules in the working directory, where other code may be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Code:
    """`python` is an interpreter, `path` a checkout that it imports first ("" for what is installed for it). `build`
    has the version and a digest of the sources, `protocols` the versions that it speaks, by protocol. `root` is the
    folder that the packages are imported from."""

    python: str
    path: str
    build: str
    root: str
    protocols: Mapping[str, VersionRange]

    @classmethod
    def own(cls) -> Self:
        """The code of this process."""
        root = str(Path(__file__).resolve().parents[2])
        return cls(python=sys.executable, path="", build=build(), root=root, protocols=PROTOCOLS)

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """The inverse of `to_json`."""
        protocols = {name: VersionRange(*numbers) for name, numbers in value["protocols"].items()}
        return cls(**{**known_fields(cls, value), "protocols": protocols})

    def to_json(self) -> dict[str, Any]:
        """As values of JSON."""
        return dataclasses.asdict(self) | {
            "protocols": {name: [each.oldest, each.newest] for name, each in self.protocols.items()}
        }

    def command(self, module: str, *arguments: str) -> list[str]:
        """The command that runs a module of this code as a program."""
        return [self.python, "-m", module, *arguments]

    def environment(self, base: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment of such a program: `base`, or that of this process, and where its modules are imported from.
        For the code of this process nothing changes."""
        base = os.environ if base is None else base
        own = Code.own()
        if (self.python, self.root) == (own.python, own.root):
            return dict(base)
        paths = [self.path] if self.path else []
        before = [each for each in base.get("PYTHONPATH", "").split(os.pathsep) if each]
        paths += [each for each in before if os.path.realpath(each) != own.root]
        return {**base, "PYTHONPATH": os.pathsep.join(paths), _SAFE_PATH: "1"}


def known_fields(of: Any, value: Mapping[str, Any]) -> dict[str, Any]:
    """The values for the fields that a dataclass has: code of another version may have written more of them."""
    return {field.name: value[field.name] for field in dataclasses.fields(of) if field.name in value}


def check_owned(*paths: str, param: str) -> None:
    """Raises InvalidRequest unless all paths are there and nobody but root and the user of this process can change
    them: what is in them runs as that user. Links are followed."""
    for path in paths:
        try:
            state = os.stat(path)
        except OSError as error:
            raise InvalidRequest(
                f"{param} names {path}, which cannot be read: {error.strerror}. Give an absolute path on the server.",
                param=param,
            ) from None
        if state.st_uid not in (0, os.getuid()) or state.st_mode & 0o022:
            raise InvalidRequest(
                f"{path} belongs to user {state.st_uid} with mode {state.st_mode & 0o777:o}; it holds code that would "
                f"run as user {os.getuid()}, so it must belong to that user or to root, and nobody else may write to "
                f"it: `chown -R` and `chmod -R go-w`.",
                param=param,
            )


async def read_code(python: str, path: str) -> Code:
    """The code that an interpreter runs with a checkout ("" for none). Raises InvalidRequest when it cannot say so."""
    unread = Code(python=python, path=path, build="", root=path, protocols={})
    where = f"{path or 'what is installed'} with {python}"
    try:
        process = await asyncio.create_subprocess_exec(
            *unread.command("serving.launch.code"),
            env=unread.environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise InvalidRequest(f"{python} cannot be started: {error.strerror}.", param="python") from None
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            out, err = await process.communicate()
    except TimeoutError:
        raise InvalidRequest(
            f"{where} has not said within {READ_TIMEOUT_S:g} s which code it is.", param="path"
        ) from None
    finally:  # also when the caller has gone
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        words = last_words(err.decode(errors="replace").splitlines())
        raise InvalidRequest(f"{where} cannot be started: {words}", param="path")
    try:
        said = json.loads(out)
        code = Code.from_json({**said, "python": python, "path": path})
    except (ValueError, TypeError, KeyError):
        raise InvalidRequest(f"{where} is no moejax that can be upgraded to.", param="path") from None
    if path and code.root != os.path.realpath(path):
        raise InvalidRequest(
            f"path is {path}, and {python} imports moejax from {code.root}. Name the folder that has serving/ in it.",
            param="path",
        )
    return code


def main() -> None:
    """Print the code of this process."""
    print(json.dumps(Code.own().to_json()))


if __name__ == "__main__":
    main()
