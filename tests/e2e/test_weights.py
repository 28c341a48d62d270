"""New weights of real ranks under load: ranks and fronts are killed while they load and while they switch, and every
token is that of an undisturbed server of its version."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.weights import Answer, Load, broken_laws, kill, perturbed, wrong_tokens
from serving.api.client import Client
from serving.errors import InvalidRequest, MoejaxError
from serving.server import Server
from tests.e2e.conftest import PAIR, TINY
from tests.support.models import MIXTRAL, model_folder
from tests.support.processes import supervised
from tests.support.streams import wait_until, wait_until_whole

Run = tuple[Answer, int, int]
"""Tokens of a stream: its answer, first and end."""


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "tiny-1"
    perturbed(TINY, folder, 1)
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(**PAIR, chaos=True) as server:
        yield server


def runs(answers: list[Answer], *labels: str) -> list[Run]:
    """Some runs of tokens of these versions, those across a switch first."""
    ordered = sorted(answers, key=lambda answer: -len(set(answer.versions)))
    return [(answer, first, end) for answer in ordered for first, end, label in answer.runs() if label in labels][:10]


def test_tokens_are_those_of_their_version_while_ranks_are_killed(server: Server, other: Path) -> None:
    with Client(server) as client:
        wait_until_whole(client)
        with Load(server.address, 4, 40) as load:
            for label, model, victim, after, running in (
                ("a", other, 1, 0.0, "switch"),
                ("b", TINY, 0, 2.0, "finish"),
            ):
                wait_until_whole(client)
                timer = threading.Timer(after, kill, (server.address, victim))
                timer.start()
                client.apply("weights", model=str(model), version=label, running=running)
                timer.join()
                assert client.status().weights_version == label
                time.sleep(0.3)
        assert not broken_laws(load.answers, ["0", "a", "b"])
        assert {label for answer in load.answers for label in answer.versions} == {"0", "a", "b"}
        wait_until_whole(client)
        assert not wrong_tokens(client, runs(load.answers, "0", "b"))
        client.apply("weights", model=str(other), version="c")
        assert not wrong_tokens(client, runs(load.answers, "a"))
        status = client.status()
        assert (status.failed, status.compiles_after_ready, status.weights_switches) == (0, 0, 3)


def test_other_models_are_refused_by_name_and_answers_have_the_version_over_http(
    server: Server, other: Path, tmp_path: Path
) -> None:
    model_folder(tmp_path / "mixtral", MIXTRAL)
    with Client(server) as client:
        before = client.status().weights_version
        with pytest.raises(InvalidRequest, match=r"cannot replace the weights of tiny: .*that of the served model is"):
            client.apply("weights", model=str(tmp_path / "mixtral"))
        with pytest.raises(InvalidRequest, match="is no folder on this machine"):
            client.apply("weights", model=str(tmp_path / "nowhere"))
        assert client.status().weights_version == before
    body = {"action": "weights", "model": str(other), "version": "http"}
    answer = httpx.post(f"{server.url}/fault_tolerance/apply", json=body, timeout=60)
    assert answer.json()["weights_version"] == "http"
    ask = {"prompt": "ROMEO:", "max_tokens": 5, "ignore_eos": True}
    said = httpx.post(f"{server.url}/v1/completions", json=ask).json()
    assert said["weights_version"] == "http"
    assert said["usage"]["weights_versions"] == {"http": 5}


@pytest.mark.slow
def test_a_front_that_is_killed_leaves_the_old_or_the_new_weights(other: Path) -> None:
    order = ["0"]
    with supervised("--ranks", "2", "--operate") as server, Client(server.address) as client:
        wait_until_whole(client)
        with Load(server.address, 3, 40) as load:
            for number, after in enumerate((0.3, 2.5), 1):
                label, model = f"v{number}", other if number % 2 else TINY
                order.append(label)
                timer = threading.Timer(after, lambda: os.kill(server.front(), signal.SIGKILL))
                timer.start()
                with contextlib.suppress(MoejaxError):  # the front dies: either version is possible
                    client.apply("weights", model=str(model), version=label)
                timer.join()
                wait_until_whole(client)
                if client.status().weights_version != label:
                    wait_until(lambda: not client.status().next_weights_version, "nothing is under way")
                    client.apply("weights", model=str(model), version=label)
                assert client.status().weights_version == label
        assert not broken_laws(load.answers, order)
        assert not wrong_tokens(client, runs(load.answers, "0", "v2"))
        client.apply("weights", model=str(other), version="last")
        assert not wrong_tokens(client, runs(load.answers, "v1"))
        assert client.status().compiles_after_ready == 0
