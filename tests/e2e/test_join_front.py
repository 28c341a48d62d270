"""The front is killed while ranks of other hosts are in: they wait for the next one, and no client misses a token."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from serving.api.client import Client
from tests.support.joining import JoinFiles, free_address, host_agent
from tests.support.processes import SMALL, Supervised, processes_of, start
from tests.support.streams import Traffic, pid_of, wait_until, wait_until_whole

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("arch", "hosts"),
    [((), {"amber": 2, "birch": 1}), (("--arch", "pd", "--prefill", "1", "--decode", "1"), {"amber": 2})],
    ids=["collocated", "pd"],
)
def test_hosts_join_the_next_front_and_streams_go_on(
    tmp_path: Path, arch: tuple[str, ...], hosts: dict[str, int]
) -> None:
    ranks = range(sum(hosts.values()))
    front, join_files = free_address(), JoinFiles.made(tmp_path, "127.0.0.1")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in join_files.settings(front).items()]
    with contextlib.ExitStack() as stack:
        for label, slots in hosts.items():
            stack.enter_context(host_agent(label, front, [*join_files.arguments(), "--count", str(slots)]))
        process = start(*SMALL, "--ranks", str(len(ranks)), *arch, *flags)
        stack.callback(process.kill)
        server = Supervised(process)
        with Client(server.address) as client:
            wait_until_whole(client)
            known = Traffic.record(client, streams=4, prompt_tokens=40, max_tokens=80)
            before = {pid_of(client.status(), rank) for rank in ranks}
            known.during(client, lambda: os.kill(server.front(), signal.SIGKILL), after=0.2)
            wait_until_whole(client)
            assert before == {pid_of(client.status(), rank) for rank in ranks}, "they have waited for the next front"
            known.during(client)
            assert client.status().compiles_after_ready == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        wait_until(lambda: not processes_of(process.pid), "no process is left", 10)
        wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in before), "nor a rank on the hosts", 10)
