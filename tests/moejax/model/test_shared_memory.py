"""The exchange over shared memory, between real processes."""

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.model.shared_memory import Arena
from moejax.ops import cpu
from serving.launch.process import shared_file

ROUNDS, SIZES, WIDTH, TIMEOUT_S = 400, (1, 7, 40), 24, 60
SPAWN = multiprocessing.get_context("spawn")


def _part(sender: int, receiver: int, turn: int) -> np.ndarray:
    """The message of one rank to another in one exchange; its length varies with the turn, so that halves are reused
    unevenly."""
    rows = np.random.default_rng(turn).choice(SIZES)
    return np.random.default_rng((sender, receiver, turn)).standard_normal((rows, WIDTH), np.float32)


def _work(path: str, n: int, me: int, rounds: int, told: Connection) -> None:
    jax.config.update("jax_platforms", "cpu")
    cpu.load()
    arena = Arena(path, ranks=n, me=me, outbox_bytes=4 * n * max(SIZES) * WIDTH, timeout_s=TIMEOUT_S)
    arena.use()
    threading.Thread(target=lambda: (told.recv(), arena.abort()), daemon=True).start()
    exchange = jax.jit(cpu.exchange)
    try:
        for turn in range(rounds):
            got = np.asarray(exchange(jnp.stack([_part(me, to, turn) for to in range(n)])))
            if not np.array_equal(got, np.stack([_part(sender, me, turn) for sender in range(n)])):
                told.send(f"exchange {turn} is wrong")
                return
        told.send("right")
    except jax.errors.JaxRuntimeError as error:
        told.send(str(error))


class _Ranks:
    def __init__(self, path: str, rounds: list[int]) -> None:
        pipes = [SPAWN.Pipe() for _ in rounds]
        self.told = [ours for ours, _ in pipes]
        self.processes = [
            SPAWN.Process(target=_work, args=(path, len(rounds), me, each, theirs), daemon=True)
            for me, (each, (_, theirs)) in enumerate(zip(rounds, pipes, strict=True))
        ]
        for process in self.processes:
            process.start()

    def said(self, rank: int) -> str:
        return self.told[rank].recv() if self.told[rank].poll(2 * TIMEOUT_S) else "nothing"


@pytest.fixture
def start() -> Iterator[Callable[[list[int]], _Ranks]]:
    try:
        cpu.build()
    except cpu.KernelError as error:
        pytest.skip(str(error))
    started: list[_Ranks] = []
    with shared_file() as path:
        yield lambda rounds: started.append(_Ranks(path, rounds)) or started[-1]
        for ranks in started:
            for process in ranks.processes:
                process.kill()
                process.join()


def test_every_part_arrives_where_it_should_in_every_exchange(start):
    ranks = start([ROUNDS] * 4)
    assert [ranks.said(rank) for rank in range(4)] == ["right"] * 4


def test_who_waits_for_the_dead_is_let_go_by_an_abort_only(start):
    """The last rank ends early and is killed: the others wait in an exchange that cannot complete, until it is
    aborted."""
    ranks = start([ROUNDS, ROUNDS, ROUNDS // 2])
    assert ranks.said(2) == "right"
    ranks.processes[2].kill()
    assert not any(told.poll(0.5) for told in ranks.told[:2])
    for told in ranks.told[:2]:
        told.send("abort")
    assert all("aborted" in ranks.said(rank) for rank in range(2))


def test_more_than_there_is_room_for_is_refused():
    with shared_file() as path:
        cpu.load()
        arena = Arena(path, ranks=2, me=0, outbox_bytes=4096, timeout_s=1)
        arena.use()
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"8192 bytes between 2 ranks.* 4096"):
            cpu.exchange(jnp.zeros((2, 1024)))
        with pytest.raises(jax.errors.JaxRuntimeError, match="waited too long"):
            cpu.exchange(jnp.zeros((2, 8)))
        arena.close()


def test_a_file_that_is_not_there_is_named():
    cpu.load()
    with pytest.raises(OSError, match="/proc/1/fd/nothing"):
        Arena("/proc/1/fd/nothing", ranks=2, me=0, outbox_bytes=4096, timeout_s=1)
