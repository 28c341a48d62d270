"""The front is killed: another one takes its place, every request goes on, and clients get exactly what they lack."""

import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.api.client import Client
from serving.protocol.events import Event
from tests.support.processes import Supervised, supervised
from tests.support.streams import Traffic, events_since, pid_of, wait_until, wait_until_whole


@pytest.fixture(scope="module")
def server() -> Iterator[Supervised]:
    """Two ranks of the tiny model under a supervisor."""
    with supervised("--ranks", "2", "--edges", "0", end=signal.SIGINT) as server:
        yield server


@pytest.fixture(scope="module")
def known(server: Supervised) -> Traffic:
    """Six streams, and what each says when nothing happens."""
    with Client(server.address) as client:
        wait_until_whole(client)
        return Traffic.record(client, streams=6, prompt_tokens=40, max_tokens=100)


def test_streams_go_on_by_themselves_when_the_front_is_killed(server: Supervised, known: Traffic) -> None:
    with Client(server.address) as client:
        before = [rank.pid for rank in client.status().ranks]

        def taken_over() -> bool:
            """Calls were open when the front died: on a busy machine it may have ended them all just before."""
            known.during(client, lambda: os.kill(server.front(), signal.SIGKILL), after=0.2)
            wait_until_whole(client)
            return _events(client)[0].kind == "restored_calls"

        wait_until(taken_over, "a front dies while calls are open")
        events = _events(client)
        assert "2 of them taken over" in next(event.message for event in events if event.kind == "ready")
        wait_until_whole(client)
        status = client.status()
        assert [rank.pid for rank in status.ranks] == before, "ranks wait for the next front"
        assert status.compiles_after_ready == 0


def test_the_front_and_a_rank_may_die_together(server: Supervised, known: Traffic) -> None:
    with Client(server.address) as client:
        wait_until_whole(client)
        known.during(client, lambda: server.kill_with(client, 1), after=0.2)


def test_a_rank_that_hangs_does_not_keep_the_next_front_waiting(server: Supervised, known: Traffic) -> None:
    with Client(server.address) as client:
        wait_until_whole(client)
        hung = pid_of(client.status(), 0)

        def stop_one() -> None:
            os.kill(server.front(), signal.SIGKILL)
            os.kill(hung, signal.SIGSTOP)

        known.during(client, stop_one, after=0.2)
        wait_until_whole(client)
        assert pid_of(client.status(), 0) != hung
        wait_until(lambda: not Path(f"/proc/{hung}").exists(), "the rank that hung is ended", 10)


def test_an_http_stream_goes_on_after_the_last_event_that_came(server: Supervised) -> None:
    body = {"prompt": "ROMEO:", "max_tokens": 80, "seed": 3, "n": 2, "stream": True, "logprobs": 1}
    body |= {"stream_options": {"include_usage": True}, "ignore_eos": True}
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "X-Moejax-Event-Ids": "true"},
    )
    with urllib.request.urlopen(request) as whole:
        undisturbed = _parts(_frames(whole))
    with urllib.request.urlopen(request) as broken:
        first = []
        for event in _frames(broken):
            first.append(event)
            if len(first) == 30:
                os.kill(server.front(), signal.SIGKILL)
                break
    last = [event["id"] for event in first if "id" in event][-1]
    resumed = urllib.request.Request(f"{server.url}/v1/resume", headers={"Last-Event-ID": last})

    def is_back() -> bool:
        try:
            with urllib.request.urlopen(resumed) as rest:
                first.extend(_frames(rest))
        except OSError:
            return False
        return True

    wait_until(is_back, "the stream goes on", 60)
    assert _parts(first) == undisturbed
    ids = [event["id"] for event in first if "id" in event]
    assert len(set(ids)) == len(ids)


def test_a_response_goes_on_after_the_number_of_the_last_event_that_came(server: Supervised) -> None:
    body = {"input": "ROMEO:", "max_output_tokens": 80, "temperature": 0, "stream": True}
    request = urllib.request.Request(
        f"{server.url}/v1/responses", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as whole:
        undisturbed = [json.loads(event["data"]) for event in _frames(whole)]
    first: list[dict[str, Any]] = []
    with urllib.request.urlopen(request) as broken:
        for event in _frames(broken):
            first.append(json.loads(event["data"]))
            if len(first) == 30:
                os.kill(server.front(), signal.SIGKILL)
                break
    assert len(first) == 30, "the front dies in the middle"
    name, last = first[0]["response"]["id"], first[-1]["sequence_number"]
    rest: list[dict[str, Any]] = []

    def is_back() -> bool:
        after = rest[-1]["sequence_number"] if rest else last
        try:
            with urllib.request.urlopen(
                f"{server.url}/v1/responses/{name}?stream=true&starting_after={after}"
            ) as events:
                rest.extend(json.loads(event["data"]) for event in _frames(events))
        except OSError:
            return False
        return True

    wait_until(is_back, "the response goes on", 60)
    events = [*first, *rest]
    assert [event["sequence_number"] for event in events] == [event["sequence_number"] for event in undisturbed]
    assert [event.get("delta") for event in events] == [event.get("delta") for event in undisturbed]
    assert events[-1]["type"] == undisturbed[-1]["type"]


def test_fronts_that_die_one_after_the_other_also_before_they_serve_do_not_end_the_server(
    server: Supervised, known: Traffic
) -> None:
    killed: set[int] = set()

    def kill_all() -> None:
        while len(killed) < 3 or "since fronts die at once" not in server.said:
            for pid in _fronts_of(server) - killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            time.sleep(0.02)

    with Client(server.address) as client:
        wait_until_whole(client)
        known.during(client, kill_all, after=0.2)
        wait_until_whole(client)


def _fronts_of(server: Supervised) -> set[int]:
    """Process ids of the front and the standby front."""
    found = subprocess.run(
        ["pgrep", "--parent", str(server.process.pid), "--full", "python.* -m serving.cli.front"],
        capture_output=True,
        text=True,
        check=False,
    )
    return set(map(int, found.stdout.split()))


def _frames(lines: "Iterator[bytes]") -> "Iterator[dict[str, str]]":
    event: dict[str, str] = {}
    for line in lines:
        name, _, value = line.decode().rstrip("\n").partition(": ")
        if name:
            event[name] = value
        elif event:
            yield event
            event = {}


def _parts(events: "Iterator[dict[str, str]] | list[dict[str, str]]") -> "dict[object, list[object]]":
    """The choices of each answer in their order, and the usage; answers may come in any order among each other."""
    found: dict[object, list[object]] = {}
    for event in events:
        if event["data"] == "[DONE]":
            continue
        value = json.loads(event["data"])
        for choice in value["choices"]:
            found.setdefault(choice["index"], []).append(choice)
        if not value["choices"]:
            found.setdefault("usage", []).append({**value["usage"], "prompt_tokens_details": None})
    return found


def _events(client: Client) -> list[Event]:
    return list(events_since(client, 0))
