"""Edges: the front or an edge is killed, and clients of any kind see a pause at most (of an edge: its own clients)."""

import json
import os
import signal
import threading
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from serving.api.client import Client
from serving.proto.moejax.v1 import inference_pb2, inference_pb2_grpc
from tests.support.processes import Supervised, supervised
from tests.support.streams import Traffic, pid_of, wait_until, wait_until_whole

PROMPTS = ("ROMEO:", "JULIET:", "First Citizen:", "KING:")
TOKENS = 240
"""Enough that a call is still open when the test has seen that it is."""


@pytest.fixture(scope="module")
def server() -> Iterator[Supervised]:
    """Two ranks of the tiny model under a supervisor, with two edges."""
    with supervised("--ranks", "2", "--edges", "2") as server:
        with Client(server.address) as client:
            wait_until(lambda: len(serving_edges(client)) == 2, "both edges serve")
        yield server


def serving_edges(client: Client) -> list[int]:
    return [edge.pid for edge in client.status().edges if edge.serving]


def post(server: Supervised, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{server.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=120)


def completion(server: Supervised, prompt: str, seed: int, *, stream: bool) -> str:
    """The text of a plain call of OpenAI's API; a stream has exactly one end."""
    body = {"prompt": prompt, "max_tokens": TOKENS, "seed": seed, "ignore_eos": True, "stream": stream}
    with post(server, "/v1/completions", body) as answer:
        if not stream:
            choice = json.load(answer)["choices"][0]
            assert choice["finish_reason"] == "length"
            return choice["text"]
        data = [line[6:].decode().strip() for line in answer if line.startswith(b"data: ")]
    assert data[-1] == "[DONE]"
    choices = [json.loads(each)["choices"][0] for each in data[:-1]]
    assert [each["finish_reason"] for each in choices if each["finish_reason"]] == ["length"]
    return "".join(each["text"] for each in choices)


def chat(server: Supervised, prompt: str, seed: int) -> str:
    """The answer of a chat completion."""
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": TOKENS, "seed": seed, "ignore_eos": True}
    with post(server, "/v1/chat/completions", body) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def plain_grpc(server: Supervised, prompt: str, seed: int) -> str:
    """The text of a call of gRPC whose client knows nothing of resuming."""
    with grpc.insecure_channel(server.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        sampling = inference_pb2.SamplingParams(max_tokens=TOKENS, seed=seed, ignore_eos=True)
        request = inference_pb2.GenerateRequest(text=prompt, sampling=sampling)
        return "".join(response.chunk.text for response in stub.Generate(request, timeout=120))


Kind = Callable[[Supervised, str, int], str]
KINDS: tuple[Kind, ...] = (
    lambda server, prompt, seed: completion(server, prompt, seed, stream=True),
    lambda server, prompt, seed: completion(server, prompt, seed, stream=False),
    chat,
    plain_grpc,
)
CALLS = [(kind, prompt, seed) for seed, prompt in enumerate(PROMPTS) for kind in KINDS]


@pytest.fixture(scope="module")
def known(server: Supervised) -> list[str]:
    """The answer of each call when nothing happens."""
    answers = [answer for answer in Calls(server).ended() if isinstance(answer, str)]
    assert len(answers) == len(CALLS)
    return answers


class Calls:
    """All calls at once, each in a thread."""

    def __init__(self, server: Supervised) -> None:
        self.answers: list[str | Exception | None] = [None] * len(CALLS)
        self._server = server
        self._threads = [threading.Thread(target=self._run, args=(place,)) for place in range(len(CALLS))]
        for thread in self._threads:
            thread.start()

    def _run(self, place: int) -> None:
        kind, prompt, seed = CALLS[place]
        try:
            self.answers[place] = kind(self._server, prompt, seed)
        except Exception as error:
            self.answers[place] = error

    def ended(self) -> list[str | Exception | None]:
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a call does not end"
        return self.answers


def counted(server: Supervised) -> tuple[float, float]:
    """By the metrics, requests that ended as they should, and others."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as answer:
        lines = [line for line in answer.read().decode().splitlines() if line.startswith("vllm:request_success_total")]
    ends = {line.split('finished_reason="')[1].split('"')[0]: float(line.split()[-1]) for line in lines}
    return ends["length"], ends["error"] + ends["abort"]


def open_calls(client: Client) -> int:
    return sum(edge.calls for edge in client.status().edges)


@pytest.mark.parametrize("with_a_rank", [False, True], ids=["front", "front and rank"])
def test_every_client_sees_a_pause_when_the_front_is_killed(
    server: Supervised, known: list[str], with_a_rank: bool
) -> None:
    with Client(server.address) as client:
        wait_until_whole(client)
        front, victim = client.status().front_pid, pid_of(client.status(), 1)
        before = counted(server)
        calls = Calls(server)
        wait_until(lambda: open_calls(client) >= len(CALLS) // 4, "calls are open")
        os.kill(front, signal.SIGKILL)
        if with_a_rank:
            os.kill(victim, signal.SIGKILL)
        assert calls.ended() == known
        assert client.status().front_pid != front
        wait_until(lambda: counted(server)[0] == before[0] + len(CALLS), "each call ends once, at whichever front")
        assert counted(server)[1] == before[1]
        wait_until_whole(client)


def test_calls_that_are_just_being_accepted_are_answered_once(server: Supervised, known: list[str]) -> None:
    with Client(server.address) as client:
        wait_until_whole(client)
        front = client.status().front_pid
        calls = Calls(server)
        os.kill(front, signal.SIGKILL)
        assert calls.ended() == known
        wait_until_whole(client)
        status = client.status()
        assert (status.running, status.waiting, status.failed) == (0, 0, 0)


def test_a_question_waits_for_the_next_front(server: Supervised) -> None:
    with Client(server.address) as client:
        before = client.status()
        os.kill(before.front_pid, signal.SIGKILL)
        assert client.status().front_pid != 0
        with urllib.request.urlopen(f"{server.url}/live", timeout=60) as alive:
            assert alive.status == 200
        wait_until_whole(client)


def test_streams_of_an_edge_that_is_killed_are_resumed_at_another_one(server: Supervised) -> None:
    with Client(server.address) as client:
        wait_until_whole(client)
        traffic = Traffic.record(client, streams=4, prompt_tokens=40, max_tokens=100)
        edges = {edge.pid: edge.calls for edge in client.status().edges}
        killed: list[int] = []

        def kill_busiest() -> None:
            open_at = {edge.pid: edge.calls for edge in client.status().edges}
            killed.append(max(open_at, key=lambda pid: open_at[pid]))
            os.kill(killed[0], signal.SIGKILL)

        traffic.during(client, kill_busiest, after=0.1)
        wait_until(lambda: len(serving_edges(client)) == 2, "another edge has been started")
        assert set(serving_edges(client)) - edges.keys(), "it is a new one"
        assert killed[0] not in serving_edges(client)
        status = client.status()
        assert (status.running, status.failed) == (0, 0)
