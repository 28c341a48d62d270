"""A client of another language that knows the .proto files and nothing else: Node's grpc-js."""

import json

from tests.support.fake_backend import FakeBackend
from tests.support.fake_server import serve_in_thread
from tests.support.node import node


def test_it_streams_an_answer_and_reads_the_status():
    backend = FakeBackend(reply=list("héllo 数学".encode()))
    with serve_in_thread(backend) as server:
        done = node(server.address, "a")
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.strip().splitlines()
    assert first == "héllo 数学"
    told = json.loads(last)
    assert told == {"finish": "FINISH_REASON_STOP", "tokens": 13, "epochs": ["0"], "alive": 4}


def test_a_refusal_arrives_with_its_status():
    with serve_in_thread(FakeBackend()) as server:
        done = node(server.address, "")
    assert done.returncode == 1
    assert "INVALID_ARGUMENT" in done.stderr
    assert "empty" in done.stderr
