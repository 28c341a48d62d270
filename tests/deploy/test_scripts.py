"""The scripts end as what they run ends: CI, and whoever calls them, sees nothing else."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Stands for the interpreter: it fails where the arguments have the words of FAILS.
PYTHON = """#!/usr/bin/env bash
if [ -n "$FAILS" ] && [[ " $* " == *" $FAILS "* ]]; then exit 1; fi
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The scripts, in a tree whose environment is made and whose interpreter does nothing."""
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/test", "scripts/check", ".ci/run"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("python", "ruff", "lint-imports", "pyright"):
        _write(tmp_path / ".venv/bin" / name, PYTHON)
    _write(tmp_path / "scripts/environment", "#!/usr/bin/env bash\n")
    return tmp_path


@pytest.mark.parametrize(
    ("fails", "ends"),
    [
        ("", 0),
        ("-m pytest tests/e2e", 1),
        ("--ignore tests/e2e", 1),
        ("-m simulation", 1),
        ("check .", 1),
        ("format --check", 1),
    ],
)
def test_ci_fails_when_one_of_its_parts_fails_and_only_then(tree: Path, fails: str, ends: int):
    environment = {"PATH": "/usr/bin:/bin", "FAILS": fails}
    run = subprocess.run([tree / ".ci/run"], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == ends, run.stderr


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
