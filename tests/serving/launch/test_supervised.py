"""Ranks that are children of the supervisor: started, found again by the next front, and ended with it."""

import asyncio
import contextlib
import selectors
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.launch.supervised import RankParent, SupervisedStarter, request_supervisor
from tests.support.streams import wait_until


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@contextlib.contextmanager
def supervisor(folder: Path) -> Iterator[RankParent]:
    """A supervisor whose requests are answered in a thread of its own."""
    parent, stop = RankParent(folder), threading.Event()

    def serve() -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(parent, selectors.EVENT_READ)
            while not stop.is_set():
                if selector.select(0.05):
                    parent.answer()
        parent.end()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield parent
    finally:
        stop.set()
        thread.join()


def test_a_rank_outlives_the_front_that_had_it_started(folder: Path) -> None:
    async def first_front() -> int:
        rank = SupervisedStarter(folder, folder, 1).start(1, f"unix:{folder / 'link'}", lambda how: None)
        assert rank.pid is not None
        return rank.pid

    async def second_front(pid: int) -> None:
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        orphans = SupervisedStarter(folder, folder, 1).orphans()
        assert list(orphans) == [1]
        rank = orphans[1](ended.set_result)
        assert rank.pid == pid
        assert rank.state not in ("", "Z", "X")
        rank.signal("SIGKILL")
        await rank.fenced()
        async with asyncio.timeout(60):
            assert await ended == "process ended with signal 9"
        assert not SupervisedStarter(folder, folder, 1).orphans()

    with supervisor(folder):
        asyncio.run(second_front(asyncio.run(first_front())))
    assert not list(folder.glob("*.log")), "the log of a rank that ended is gone"


def test_of_two_that_are_the_same_rank_the_older_one_is_ended(folder: Path) -> None:
    async def front() -> None:
        launcher = SupervisedStarter(folder, folder, 1)
        old, new = (launcher.start(0, f"unix:{folder / 'link'}", lambda how: None) for _ in range(2))
        rank = launcher.orphans()[0](lambda how: None)
        assert rank.pid == new.pid
        await old.fenced()
        old.end()

    with supervisor(folder):
        asyncio.run(front())


def test_ranks_end_with_their_supervisor(folder: Path) -> None:
    async def front() -> int:
        rank = SupervisedStarter(folder, folder, 1).start(0, f"unix:{folder / 'link'}", lambda how: None)
        rank.signal("SIGSTOP")
        assert rank.pid is not None
        return rank.pid

    with supervisor(folder):
        pid = asyncio.run(front())
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the rank has ended", 10)


def test_a_malformed_request_harms_nobody(folder: Path) -> None:
    async def front() -> None:
        for request in (b"\n", b"{]\n", b""):
            with socket.socket(socket.AF_UNIX) as caller:
                caller.connect(str(folder / "ranks"))
                caller.sendall(request)
                caller.shutdown(socket.SHUT_WR)
                assert caller.recv(10) == b""
        assert SupervisedStarter(folder, folder, 1).orphans() == {}

    with supervisor(folder):
        asyncio.run(front())


def test_fields_that_are_not_known_are_left_out_and_requests_that_are_not_known_get_an_error(folder: Path) -> None:
    with supervisor(folder):
        for request in ({"later": 1}, {"start": {"rank": 0}}, {"ended": "no pid"}):
            with pytest.raises(OSError, match="is not understood"):
                request_supervisor(folder, **request)
        log = folder / "rank0.log"
        spec = {"rank": 0, "token": "t", "log": str(log), "variables": {"MOEJAX_LINK_RANK": "0"}, "later": 1}
        assert request_supervisor(folder, start=spec) > 0
