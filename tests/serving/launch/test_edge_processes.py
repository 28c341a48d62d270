"""Edges as children of the supervisor: they share its ports, are started again when they die, and end with it."""

import contextlib
import os
import selectors
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.api.surfaces import raise_file_limit
from serving.config import Settings
from serving.errors import StartError
from serving.launch.edge_processes import EDGE_PROGRAM, EdgeProcesses, SharedPorts
from serving.launch.forkserver import Forkserver
from serving.launch.run_folder import RunFolder
from tests.support.processes import has_ended, stack_of
from tests.support.streams import wait_until

FREE = Settings(grpc_port=0, http_port=0, edges=2)


def bound(port: int, *, shares: bool) -> socket.socket:
    """A socket at a port, which `shares` it or not."""
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shares))
    found.bind(("127.0.0.1", port))
    return found


def test_the_ports_are_reserved_and_edges_can_share_that_of_grpc() -> None:
    ports = SharedPorts(FREE)
    settings = ports.in_settings(FREE)
    assert 0 not in (settings.grpc_port, settings.http_port)
    with bound(settings.grpc_port, shares=True) as one, bound(settings.grpc_port, shares=True) as other:
        one.listen()
        other.listen()
        for port in (settings.grpc_port, settings.http_port):
            with pytest.raises(OSError, match="in use"):
                bound(port, shares=False)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", settings.http_port), 5)  # not before an edge serves
    ports.close()


@pytest.mark.parametrize("name", ["grpc_port", "http_port"])
def test_a_port_that_is_taken_is_refused_with_its_flag(name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = Settings(**{"grpc_port": 0, "http_port": 0, name: port})
        with pytest.raises(StartError, match=rf"127\.0\.0\.1:{port}.*--{name.replace('_', '-')}"):
            SharedPorts(settings)


@pytest.fixture
def _many_open_files() -> Iterator[None]:
    """The next descriptors are above what `select` takes."""
    raise_file_limit()
    with contextlib.ExitStack() as stack:
        while stack.enter_context(Path(os.devnull).open()).fileno() < 1024:
            pass
        yield


@pytest.mark.usefixtures("_many_open_files")
@pytest.mark.parametrize("fork_server_dies", [False, True])
def test_an_edge_that_dies_is_started_again_and_all_end_when_the_supervisor_does(
    tmp_path_factory: pytest.TempPathFactory, fork_server_dies: bool
) -> None:
    run, ports = RunFolder(Path(tmp_path_factory.mktemp("run"))), SharedPorts(FREE)
    run.settings.write_text(ports.in_settings(FREE).to_toml())
    with selectors.DefaultSelector() as selector:
        forkserver = Forkserver(EDGE_PROGRAM)
        edges = EdgeProcesses(FREE, run, ports, selector, forkserver)
        assert forkserver._process is not None
        server = forkserver._process.pid
        forked = stack_of(server)
        try:
            pids = {edge.process.pid for edge in edges._edges.values()}
            assert len(pids) == 2
            assert {stack_of(pid) for pid in pids} == {forked}
            if fork_server_dies:
                os.kill(server, signal.SIGKILL)
                wait_until(lambda: has_ended(server), "the fork server has ended")
            victim = min(pids)
            os.kill(victim, signal.SIGKILL)
            (key,) = (key for key, _ in selector.select(60))
            assert key.data is edges
            assert edges.on_ended(key.fileobj, was_ready=True) == -signal.SIGKILL
            assert edges.pause_s is not None
            while edges.pause_s is not None:
                edges.start_due()
            now = {edge.process.pid for edge in edges._edges.values()}
            assert len(now) == 2
            assert now & pids == pids - {victim}
            assert ({stack_of(pid) for pid in now} == {forked}) != fork_server_dies
        finally:
            edges.end()
            forkserver.end()
        assert not any(Path(f"/proc/{pid}").exists() for pid in now)
        assert not selector.get_map()
    ports.close()
