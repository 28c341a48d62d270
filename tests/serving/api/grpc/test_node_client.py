"""A client of another language that knows the .proto files and nothing else: Node's grpc-js."""

import json
import os
import subprocess
from pathlib import Path

from tests.fake_backend import FakeBackend
from tests.fixtures import node_modules
from tests.serving.test_client import running

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "node_client.js"


def node(address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"NODE_PATH": str(node_modules())}
    command = ["node", str(SCRIPT), address, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def test_it_streams_an_answer_and_reads_the_status():
    backend = FakeBackend(reply=list("héllo 数学".encode()))
    with running(backend) as server:
        done = node(server.address, "a")
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.strip().splitlines()
    assert first == "héllo 数学"
    told = json.loads(last)
    assert told == {"finish": "FINISH_REASON_STOP", "tokens": 13, "epochs": ["0"], "alive": 4}


def test_a_refusal_arrives_with_its_status():
    with running(FakeBackend()) as server:
        done = node(server.address, "")
    assert done.returncode == 1
    assert "INVALID_ARGUMENT" in done.stderr
    assert "empty" in done.stderr
