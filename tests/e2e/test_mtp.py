"""Drafts of the model's own layer change no bit of an answer, whichever process dies in the middle of them."""

import concurrent.futures
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.api.client import Client
from tests.e2e.conftest import TINY
from tests.support.drafts import accepted, answers, parts
from tests.support.processes import Supervised, supervised
from tests.support.streams import kill, wait_until, wait_until_whole

MTP = (
    *("--ranks", "2", "--speculate", "mtp", "--draft-tokens", "2"),
    *("--kv-cache-type", "float32", "--edges", "0", "--chaos"),
)
"""The cache of a layer that drafts has no other type. With a number of drafts the layer runs after every step of a
request that is drafted for, and is skipped where none is."""


@pytest.fixture(scope="module")
def server() -> Iterator[Supervised]:
    """Two ranks of the tiny model with its layer that drafts, under a supervisor; ranks that die come back."""
    with supervised(*MTP) as server:
        yield server


@pytest.fixture(scope="module")
def plain(server: Supervised) -> list[tuple[object, ...]]:
    """The answers without drafts."""
    with Client(server.address) as client:
        wait_until_whole(client)
        before = client.status()
        outputs = answers(client, speculate=False)
        assert accepted(outputs) == 0
        after = client.status()
        assert after.draft_passes_skipped - before.draft_passes_skipped == after.steps - before.steps > 0
        assert after.compiles_after_ready == 0
        return parts(outputs)


@pytest.mark.parametrize(
    "dies", ["nobody", "rank 0", pytest.param("the front", marks=pytest.mark.slow), "the front and rank 1"]
)
def test_guesses_change_no_bit_of_an_answer(server: Supervised, plain: list[tuple[object, ...]], dies: str) -> None:
    with Client(server.address) as client:
        wait_until_whole(client)
        before = client.status()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            drafted = pool.submit(answers, client, speculate=True)
            if dies != "nobody":
                wait_until(lambda: client.status().accepted > before.accepted, "guesses are right")
            if "rank" in dies and "front" not in dies:
                kill(client, int(dies[-1]))()
            elif dies == "the front":
                os.kill(server.front(), signal.SIGKILL)
            elif dies != "nobody":
                server.kill_with(client, 1)
            outputs = drafted.result()
        assert parts(outputs) == plain
        assert accepted(outputs) > 0
        wait_until_whole(client)
        status = client.status()
        assert status.speculate == "mtp"
        assert status.compiles_after_ready == 0
        assert len(status.expert_load) == 5  # the layer's experts are placed and counted as those of the others
        if "front" not in dies:
            assert accepted(outputs) == status.accepted - before.accepted


def test_a_model_without_the_layer_is_refused_with_the_way_out(tmp_path: Path) -> None:
    for file in TINY.iterdir():
        if file.name != "mtp":
            (tmp_path / file.name).symlink_to(file)
    command = [sys.executable, "-m", "moejax.tools.prepare", "--mtp", str(tmp_path), "float32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "tiny has no layer of multi-token prediction" in done.stderr
    assert "Serve it with --speculate ngram or off." in done.stderr
