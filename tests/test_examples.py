"""Every file under examples/ runs, over the fake backend (that of Node in
`tests/serving/api/grpc/test_node_client.py`)."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fake_backend import FakeBackend
from tests.support.fake_server import FakeServer, serve

ROOT = Path(__file__).parents[1]
TARGETS = {
    "stream.py": lambda s: s.address,
    "many_at_once.py": lambda s: s.address,
    "survive_a_kill.py": lambda s: s.address,
    "openai_client.py": lambda s: f"{s.url}/v1",
    "http.sh": lambda s: s.url,
}


def run(file: Path, server: FakeServer) -> subprocess.CompletedProcess[str]:
    target = TARGETS[file.name](server)
    command = [sys.executable, "-m", f"examples.{file.stem}"] if file.suffix == ".py" else [str(file)]
    return subprocess.run([*command, target], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "file", sorted(p for p in (ROOT / "examples").glob("*.*") if p.suffix != ".js"), ids=lambda f: f.name
)
async def test_an_example_runs(file):
    async with serve(FakeBackend(reply=list(b"some words " * 10), delay_s=0.001)) as server:
        done = await asyncio.to_thread(run, file, server)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert file.name != "survive_a_kill.py" or "epochs (0, 1), same text: True" in done.stdout
