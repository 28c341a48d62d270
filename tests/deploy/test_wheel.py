"""An installed wheel works outside the checkout: the planner's presets, and a server of the tiny model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVE = """
import planner, serving
from serving import Client, Server
with Server(model="tiny", ranks=1) as server, Client(server) as client:
    print(planner.__file__, serving.__file__, client.generate("ROMEO:", max_tokens=4, temperature=0).text, sep="\\n")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel of this checkout, without what it depends on: that comes from the environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/", "benchmarks/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    target = folder / "site"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", str(target), str(source)], check=True, timeout=300)
    return target


def run(installed: Path, folder: Path, *command: str) -> str:
    """The standard output of a Python command in a folder that is no checkout."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_presets_of_models_and_clusters_are_found(installed, tmp_path):
    plan = run(installed, tmp_path, "-m", "planner", "solve", "deepseek-v3", "h200:40x8", "--survive", "hosts=1")
    assert "256 experts" in plan


def test_the_server_of_the_tiny_model_answers(installed, tmp_path):
    planner, serving, text = run(installed, tmp_path, "-c", SERVE).split("\n", 2)
    assert Path(planner).is_relative_to(installed)
    assert Path(serving).is_relative_to(installed)
    assert text.strip()


def test_types_are_published(installed):
    assert all((installed / package / "py.typed").is_file() for package in ("planner", "moejax", "serving"))
