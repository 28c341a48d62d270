"""The command line of a benchmark, and its result as a file."""

import argparse
import json
from pathlib import Path
from typing import Any


def parser(program: str, text: str | None) -> argparse.ArgumentParser:
    """A parser for `python -m PROGRAM`, described by the text of its module: the first line, then the rest."""
    about, _, rest = (text or "").partition("\n")
    return argparse.ArgumentParser(
        prog=f"python -m {program}",
        description=about,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def write_json(path: Path | None, result: Any) -> None:
    """Write a result to the file that `--json` names, if it names one."""
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")
