"""Edges on other hosts: `moejax edge` over TLS on this machine, whose front, and which itself, is killed."""

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.api.client import Client
from tests.e2e.conftest import TINY
from tests.e2e.test_edges import completion
from tests.support.joining import JoinFiles
from tests.support.processes import ROOT, Supervised, read_until, supervised
from tests.support.streams import Traffic, events_since, wait_until, wait_until_whole

TOKENS = 240
PROMPTS = ("ROMEO:", "JULIET:")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> JoinFiles:
    return JoinFiles.made(tmp_path_factory.mktemp("files"), "127.0.0.1")


@pytest.fixture(scope="module")
def server(files: JoinFiles) -> Iterator[Supervised]:
    """Two ranks of the tiny model under a supervisor, with an edge beside the front, and a port for others."""
    names = {"cert": "front.pem", "key": "front.key", "client_ca": "ca.pem"}
    tls = [f"--rank-tls-{name.replace('_', '-')}={files.folder / file}" for name, file in names.items()]
    port = ["--edge-listen", "127.0.0.1:0", "--edge-tokens", str(files.folder / "tokens.json"), *tls]
    with supervised("--ranks", "2", *port) as server:
        yield server


def front_of(server: Supervised) -> str:
    return re.search(r"edges +(127\S+)", server.said)[1]  # type: ignore[index]


def command(files: JoinFiles, server: Supervised, *more: str) -> list[str]:
    words = ["edge", "--front", front_of(server), *files.arguments(), "--http-port", "0", "--grpc-port", "0", *more]
    return [sys.executable, "-m", "serving", *words]


class RemoteEdge:
    """A running `moejax edge`, with the address and the URL that `Supervised` has."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.said = read_until(process, r"HTTP +\S+")
        self.address = re.search(r"gRPC +(\S+)", self.said)[1]  # type: ignore[index]
        self.url = re.search(r"HTTP +(\S+)", self.said)[1]  # type: ignore[index]
        self._reading = threading.Thread(target=self._drain, daemon=True)
        self._reading.start()

    def _drain(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@contextlib.contextmanager
def edge_of(files: JoinFiles, server: Supervised, *more: str) -> Iterator[RemoteEdge]:
    process = subprocess.Popen(command(files, server, *more), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        yield RemoteEdge(process)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def edge(files: JoinFiles, server: Supervised, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteEdge]:
    """An edge whose host has the model in a folder of its own, without weights."""
    folder = tmp_path_factory.mktemp("model")
    for path in Path(TINY).iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    with edge_of(files, server, "--model", str(folder)) as edge:
        yield edge


def chat(server: Any, prompt: str, seed: int) -> str:
    """The answer of a chat completion, which uses the template on the edge's own host."""
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": TOKENS, "seed": seed, "ignore_eos": True}
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


KINDS: tuple[Callable[[Any, str, int], str], ...] = (
    lambda server, prompt, seed: completion(server, prompt, seed, stream=True),
    lambda server, prompt, seed: completion(server, prompt, seed, stream=False),
    chat,
)
CALLS = [(kind, prompt, seed) for seed, prompt in enumerate(PROMPTS) for kind in KINDS]


def all_at_once(server: Any) -> list[str]:
    """The answers of all calls."""
    with concurrent.futures.ThreadPoolExecutor(len(CALLS)) as pool:
        return list(pool.map(lambda call: call[0](server, *call[1:]), CALLS))


def remote_calls(client: Client) -> int:
    return sum(each.calls for each in client.status().edges if each.host)


def test_clients_of_an_edge_on_another_host_see_a_pause_when_the_front_is_killed(
    server: Supervised, edge: RemoteEdge
) -> None:
    known = all_at_once(server)
    assert all_at_once(edge) == known, "the text is that of the local edge"
    answers: list[str | Exception | None] = [None] * len(CALLS)

    def ask(place: int) -> None:
        kind, prompt, seed = CALLS[place]
        try:
            answers[place] = kind(edge, prompt, seed)
        except Exception as error:
            answers[place] = error

    with Client(server.address) as client:
        front = client.status().front_pid
        threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(CALLS))]
        for thread in threads:
            thread.start()
        wait_until(lambda: remote_calls(client) >= 2, "calls are open")
        os.kill(front, signal.SIGKILL)
        for thread in threads:
            thread.join(120)
        assert answers == known
        assert client.status().front_pid != front
        wait_until_whole(client)
        [remote] = [each for each in client.status().edges if each.host]
        assert (remote.serving, remote.calls, remote.build) == (True, 0, client.status().build)
    assert edge.get("/health") == (200, '{"status":"ready"}')
    _, metrics = edge.get("/metrics")
    ends = re.findall(r'vllm:request_success_total\{finished_reason="length".*\} (\S+)', metrics)
    assert [float(each) for each in ends] == [2 * len(CALLS)], "its own requests alone, each once"
    assert "moejax_remote_edges 1.0" in metrics


def test_streams_of_an_edge_that_is_killed_are_resumed_at_the_local_one(server: Supervised, files: JoinFiles) -> None:
    with edge_of(files, server) as dying, Client(f"ipv4:{dying.address},{server.address}") as client:
        traffic = Traffic.record(client, streams=3, prompt_tokens=40, max_tokens=100)
        traffic.during(client, dying.process.kill, after=0.1)
        wait_until(lambda: not any(each.calls for each in client.status().edges), "no call is left open")
        assert client.status().failed == 0


def test_a_wrong_token_or_another_model_ends_the_edge_with_one_line(
    server: Supervised, files: JoinFiles, tmp_path: Path
) -> None:
    wrong = files.write_token("wrong", "mjr_wrong")
    (tmp_path / "tokenizer.json").write_text("{}")
    for more, text in (
        (
            ["--token-file", str(wrong)],
            "error: the front does not let this edge in: this is no join token of this server.",
        ),
        (["--model", str(tmp_path)], f"error: {tmp_path} holds another tokenizer"),
    ):
        done = subprocess.run(command(files, server, *more), cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        assert len(errors) == 1, done.stderr
        assert text in errors[0]


def test_an_edge_that_is_asked_to_end_lets_its_streams_end_and_survives_the_server(
    server: Supervised, files: JoinFiles, edge: RemoteEdge
) -> None:
    known = completion(server, PROMPTS[0], 0, stream=True)
    with edge_of(files, server) as leaving, Client(server.address) as client:
        before = remote_calls(client)
        answers: list[str] = []
        thread = threading.Thread(target=lambda: answers.append(completion(leaving, PROMPTS[0], 0, stream=True)))  # type: ignore[arg-type]
        thread.start()
        wait_until(lambda: remote_calls(client) > before, "its call is open")
        leaving.process.send_signal(signal.SIGTERM)
        thread.join(60)
        assert (answers, leaving.process.wait(30)) == ([known], 0)
        wait_until(lambda: len([each for each in client.status().edges if each.host]) == 1, "it has gone")
        wait_until(lambda: any(each.kind == "edge_ended" for each in events_since(client, 0)), "said so")
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    wait_until(lambda: edge.get("/health")[0] == 503, "not ready")
    assert edge.get("/live")[0] == 200
    assert edge.process.poll() is None
    edge.process.send_signal(signal.SIGTERM)
    assert edge.process.wait(30) == 0
