"""The tools that are tried: for each a program in `clients/tools/`, whose first lines say what it needs.

They are inline script metadata (PEP 723), a TOML text in comments: `dependencies` from PyPI, and under `[tool.clients]`
`name`, `npm`, `debian`, `minutes` (the most that its trials may take), and `partial`: a package of whose requirements
those in `leave_out` (`*`: all) are not installed, because the registry lacks them or the trials use no GPU's libraries.
"""

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any, Self

TOOLS = Path(__file__).parent / "tools"
_METADATA = re.compile(r"^(?P<mark>#|//) /// script\n(?P<text>(?:(?P=mark)(?: .*)?\n)+?)(?P=mark) ///$", re.MULTILINE)
_VERSION = re.compile(r"==|(?<!^)@|(?<![<>=])=")
"""Between the name of a package and its version: of PyPI, npm, Debian."""
_MINUTES = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tool:
    """A tool of a pinned version."""

    program: Path
    name: str
    pypi: tuple[str, ...] = ()
    partial: str = ""
    leave_out: tuple[str, ...] = ()
    npm: tuple[str, ...] = ()
    debian: tuple[str, ...] = ()
    minutes: float = _MINUTES

    @classmethod
    def of(cls, program: Path) -> Self:
        """The tool of a program. Raises ValueError when its first lines do not describe one."""
        found = _METADATA.search(program.read_text())
        if found is None:
            raise ValueError(f"{program} has no inline script metadata (PEP 723).")
        mark = found["mark"]
        text = "\n".join(line.removeprefix(mark).removeprefix(" ") for line in found["text"].splitlines())
        values = tomllib.loads(text)
        own: dict[str, Any] = values.get("tool", {}).get("clients", {})
        lists = {key: tuple(own.pop(key, ())) for key in ("leave_out", "npm", "debian")}
        tool = cls(program=program, pypi=tuple(values.get("dependencies", ())), **lists, **own)
        if not tool.packages or not _VERSION.search(tool.packages[0]):
            raise ValueError(f"{program}: the package of the tool is pinned to a version, and is not.")
        return tool

    @property
    def packages(self) -> tuple[str, ...]:
        """The packages that are installed, with versions; the first is the tool itself."""
        return (*filter(None, (self.partial,)), *self.pypi, *self.npm, *self.debian)

    @property
    def key(self) -> str:
        """The name of the program, and of the tool's environment."""
        return self.program.stem

    @property
    def version(self) -> str:
        """The version of the tool."""
        return _VERSION.split(self.packages[0], maxsplit=1)[1]

    @property
    def registry(self) -> str:
        """Where it comes from."""
        return "npm" if self.npm else "Debian" if self.debian else "PyPI"


def tools() -> tuple[Tool, ...]:
    """All tools, by the name of their programs."""
    programs = [*TOOLS.glob("*.py"), *TOOLS.glob("*.mjs")]
    return tuple(Tool.of(program) for program in sorted(programs) if program.name != "__init__.py")
