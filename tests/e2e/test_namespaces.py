"""Ranks in network namespaces of their own, so that one can be cut off: no stream breaks, and the front
ignores the rank until it joins again."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.api.client import Client
from serving.server import Server
from tests.e2e.conftest import FEW_BUCKETS, TINY
from tests.support.joining import JoinFiles, host_agent
from tests.support.streams import Traffic, events_since, last_event, pid_of, wait_until, wait_until_whole

FRONT, PORT = "10.213.77.1", 50052
HOSTS = {"east": "10.213.77.2", "north": "10.213.77.3", "west": "10.213.77.4"}
BRIDGE = "moejax-test"


def ip(*arguments: str) -> None:
    """The command `ip`; skips the test where it may not."""
    try:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs the command ip (iproute2)")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: ip {' '.join(arguments)}: {error.stderr.strip()}")


@pytest.fixture(scope="module")
def network() -> Iterator[None]:
    """A bridge with the front's address, and a namespace on it for each host."""
    ip("link", "add", BRIDGE, "type", "bridge")
    try:
        ip("addr", "add", f"{FRONT}/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        for name, address in HOSTS.items():
            ip("netns", "add", f"moejax-{name}")
            ip("link", "add", f"mj-{name}", "type", "veth", "peer", "name", "eth0", "netns", f"moejax-{name}")
            ip("link", "set", f"mj-{name}", "master", BRIDGE, "up")
            inside = ("-n", f"moejax-{name}")
            ip(*inside, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                ip(*inside, "link", "set", device, "up")
        yield
    finally:
        for command in (["link", "del", BRIDGE], *(["netns", "del", f"moejax-{name}"] for name in HOSTS)):
            subprocess.run(["ip", *command], check=False, capture_output=True)


@pytest.fixture(scope="module")
def spread(network: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A server with a rank in each namespace."""
    join_files = JoinFiles.made(tmp_path_factory.mktemp("join_files"), FRONT)
    front = f"{FRONT}:{PORT}"
    arguments = [*join_files.arguments(), "--orphan-timeout", "5"]
    with contextlib.ExitStack() as stack:
        for name in HOSTS:
            within = ("ip", "netns", "exec", f"moejax-{name}")
            stack.enter_context(host_agent(name, front, arguments, within=within))
        settings = join_files.settings(front)
        with (
            Server(model=str(TINY), ranks=3, buckets=FEW_BUCKETS, lattice_depth=1, **settings) as server,
            Client(server) as client,
        ):
            wait_until_whole(client)
            yield client


@pytest.fixture(scope="module")
def traffic(spread: Client) -> Traffic:
    return Traffic.record(spread, streams=6, prompt_tokens=40, max_tokens=60)


def test_a_link_that_is_cut_for_300_milliseconds_costs_no_rank_and_no_token(spread: Client, traffic: Traffic) -> None:
    before = last_event(spread)

    def cut_for_a_moment() -> None:
        ip("link", "set", "mj-north", "down")
        time.sleep(0.3)
        ip("link", "set", "mj-north", "up")

    traffic.during(spread, cut_for_a_moment)
    assert "rank_lost" not in [event.kind for event in events_since(spread, before)]
    assert spread.status().compiles_after_ready == 0


def test_a_rank_that_is_cut_off_changes_no_token_ends_by_itself_and_joins_again(
    spread: Client, traffic: Traffic
) -> None:
    before, status = last_event(spread), spread.status()
    victim = next(rank.id for rank in status.ranks if rank.host == "north")
    pid = pid_of(status, victim)
    assert _address_of(pid) == HOSTS["north"]
    traffic.during(spread, lambda: ip("link", "set", "mj-north", "down"))
    lost = [event for event in events_since(spread, before) if event.kind == "rank_lost"]
    assert [event.rank for event in lost] == [victim]
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "who is cut off ends by itself")
    traffic.during(spread)
    ip("link", "set", "mj-north", "up")
    wait_until_whole(spread)
    assert spread.status().compiles_after_ready == 0
    traffic.during(spread)


def _address_of(pid: int) -> str:
    """The address, not of loopback, that a process has connections from."""
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    local = {bytes.fromhex(row[1].partition(":")[0])[::-1] for row in rows if row[3] == "01"}
    (found,) = {".".join(map(str, address)) for address in local} - {"127.0.0.1"}
    return found
