"""Upgrades of a running server: to a copy of this checkout and back, and to copies that must be rolled back."""

import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.api.client import Client
from serving.errors import Unreachable
from serving.protocol.status import Status
from serving.protocol.versions import PROTOCOLS
from serving.version import build
from tests.support.checkouts import copy_checkout
from tests.support.processes import ROOT, Supervised, stack_of, supervised
from tests.support.streams import Traffic, wait_until, wait_until_whole

STREAMS = 5
"""Enough for both kinds, at either edge."""
PAUSE_S = 0.4
"""Between two streams of a client: others are open then, and the processes that start have a part of the processors."""
LIMIT_S = 240.0


@pytest.fixture(scope="module")
def server() -> Iterator[Supervised]:
    """Two ranks of the tiny model under a supervisor, with two edges."""
    with supervised("--ranks", "2", "--edges", "2", "--operate") as server:
        yield server


@pytest.fixture(scope="module")
def traffic(server: Supervised) -> Traffic:
    with Client(server.address) as client:
        wait_until_whole(client)
        return Traffic.record(client, streams=STREAMS, prompt_tokens=40, max_tokens=60)


class Load:
    """Streams of every kind that run again and again, while the context is entered. Each must be as it is known."""

    def __init__(self, server: Supervised, traffic: Traffic) -> None:
        self.done = 0
        self._wrong: list[object] = []
        self._server, self._traffic, self._stop = server, traffic, threading.Event()
        self._text = completion(server)
        self._threads = [threading.Thread(target=self._run, args=(place,)) for place in range(STREAMS)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive(), "a stream does not end"
        assert not self._wrong, self._wrong[:3]
        assert self.done >= len(self._threads)

    def _run(self, place: int) -> None:
        """A client of gRPC, which resumes, or one in eight of OpenAI's API, which does not."""
        with Client(self._server.address) as client:
            while not self._stop.is_set():
                try:
                    if place % 8 == 0:
                        had, has = self._text, completion(self._server)
                    else:
                        known = self._traffic.known[place]
                        stream = known.again()
                        stream.run(client)
                        had, has = (None, known.tokens), (stream.error, stream.tokens)
                except Exception as error:
                    had, has = "no error", repr(error)
                if had != has:
                    self._wrong.append((place, had, has))
                self.done += 1
                time.sleep(PAUSE_S)


def completion(server: Supervised) -> str:
    """The text of a stream of OpenAI's API, which has exactly one end."""
    body = {"prompt": "ROMEO:", "max_tokens": 40, "seed": 7, "ignore_eos": True, "stream": True}
    with post(server, "/v1/completions", body) as answer:
        data = [line[6:].decode().strip() for line in answer if line.startswith(b"data: ")]
    assert data[-1] == "[DONE]"
    return "".join(json.loads(each)["choices"][0]["text"] for each in data[:-1])


def post(server: Supervised, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{server.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=120)


def fork_server_of(server: Supervised) -> int:
    """The process that fronts and edges are forked from: one, whatever the code was before."""
    command = ["pgrep", "--parent", str(server.process.pid), "--full", "forkserver serving.cli.front"]
    (pid,) = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return int(pid)


def upgrade(server: Supervised, path: Path) -> "subprocess.CompletedProcess[str]":
    """`moejax upgrade`."""
    command = [sys.executable, "-m", "serving", "upgrade", "--path", str(path), "--server", server.address]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)


def ended(client: Client) -> bool:
    """Whether no upgrade is under way; nobody says so while the edge is replaced that this client is connected to."""
    try:
        return client.status().upgrade not in ("running", "rolling_back")
    except Unreachable:
        return False


def builds(status: Status) -> set[str]:
    """The builds of all processes."""
    return {status.build, *(edge.build for edge in status.edges), *(rank.build for rank in status.ranks)}


def test_an_upgrade_and_the_way_back_lose_and_change_no_token(
    server: Supervised, traffic: Traffic, tmp_path: Path
) -> None:
    with Client(server.address) as client:
        before = client.status()
        assert builds(before) == {build()}
        with Load(server, traffic):
            ran = upgrade(server, copy_checkout(tmp_path / "new"))
        assert ran.returncode == 0, ran.stdout + ran.stderr
        new = client.status()
        assert new.upgrade == "done"
        assert len(builds(new)) == 1
        assert new.build != build()
        assert new.front_pid != before.front_pid
        assert not {edge.pid for edge in new.edges} & {edge.pid for edge in before.edges}
        assert not {rank.pid for rank in new.ranks} & {rank.pid for rank in before.ranks}
        forked = {stack_of(pid) for pid in (new.front_pid, *(edge.pid for edge in new.edges))}
        assert forked == {stack_of(fork_server_of(server))}, "they have the imports of the new code, made once"
        assert (new.failed, new.compiles_after_ready) == (0, 0)

        with Load(server, traffic):
            with post(server, "/fault_tolerance/apply", {"action": "upgrade", "path": str(ROOT)}) as answer:
                assert json.load(answer)["serving"]
            wait_until(lambda: ended(client), "the way back is done", LIMIT_S)
        back = client.status()
        assert (back.upgrade, back.upgrades_done) == ("done", 2)
        assert builds(back) == {build()}
        assert (back.failed, back.compiles_after_ready) == (0, 0)


BROKEN = {
    "a front that cannot start": (
        "serving.cli.front",
        "def main() -> int:\n",
        "def main() -> int:\n    raise OSError\n",
    ),
    "an edge that cannot start": ("serving.edge", "    raise_file_limit()\n", "    raise_file_limit()\n    return 3\n"),
    "ranks that cannot start": ("serving.worker.main", "    die_with_parent()\n", "    raise OSError('no device')\n"),
    "a front that answers otherwise": (
        "serving.executor.step_messages",
        "np.frombuffer(answer.tokens, np.int32), ",
        "np.frombuffer(answer.tokens, np.int32) ^ 1, ",
    ),
    "an edge that answers otherwise": (
        "serving.core.canary_text",
        "prompt = await processor.encode(PROMPT)",
        "prompt = (await processor.encode(PROMPT))[::-1]",
    ),
    "ranks that answer otherwise": (
        "serving.worker.steps",
        "np.asarray(sampled[0]).tobytes()",
        "(np.asarray(sampled[0]) ^ 1).tobytes()",
    ),
}


QUICK = ("a front that cannot start", "an edge that answers otherwise", "ranks that answer otherwise")


@pytest.mark.parametrize(
    "what", [pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in BROKEN]
)
def test_a_version_that_does_not_start_or_answers_otherwise_is_rolled_back(
    what: str, server: Supervised, traffic: Traffic, tmp_path: Path
) -> None:
    name, before, after = BROKEN[what]
    with Client(server.address) as client:
        wait_until_whole(client)
        count = client.status().upgrades_rolled_back
        with Load(server, traffic):
            ran = upgrade(server, copy_checkout(tmp_path / "broken", **{name: (before, after)}))
        assert ran.returncode == 1, ran.stdout
        assert "rolled back, all processes run" in ran.stdout
        wait_until_whole(client)
        status = client.status()
        assert (status.upgrade, status.upgrades_rolled_back) == ("rolled_back", count + 1)
        assert status.upgrade_cause
        assert builds(status) == {build()}
        assert (status.failed, status.compiles_after_ready) == (0, 0)


@pytest.mark.parametrize("protocol", ["LINK", "EDGE", "JOURNAL", "SUPERVISOR"])
def test_code_that_speaks_another_protocol_is_refused_with_both_numbers(
    protocol: str, server: Supervised, traffic: Traffic, tmp_path: Path
) -> None:
    ours = PROTOCOLS[protocol.lower()]
    change = (f"{protocol} = VersionRange({ours.oldest}, {ours.newest})", f"{protocol} = VersionRange(7, 8)")
    other = copy_checkout(tmp_path / "other", **{"serving.protocol.versions": change})
    with Client(server.address) as client:
        before = client.status()
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(server, "/fault_tolerance/apply", {"action": "upgrade", "path": str(other)})
        text = refused.value.read().decode()
        assert refused.value.code == 400
        assert f"version 7 to 8 of the {protocol.lower()} protocol, and this process version {ours}" in text
        after = client.status()
        assert (after.front_pid, after.upgrade) == (before.front_pid, before.upgrade)


def test_code_that_runs_already_is_refused(server: Supervised, traffic: Traffic) -> None:
    ran = upgrade(server, ROOT)
    assert ran.returncode == 1
    assert "already" in ran.stderr
