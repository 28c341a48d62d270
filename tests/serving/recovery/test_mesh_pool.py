"""The pool of meshes: what is compiled, loaded and connected, and what is left of it after a loss."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable

import pytest

import serving.recovery.mesh_pool
from serving.executor.mesh_key import MeshKey
from serving.executor.rank_errors import CommandFailed, RankLost
from serving.proto.moejax.v1 import link_pb2
from serving.recovery.membership_events import GenerationOpened, MeshLoaded
from serving.recovery.mesh_pool import MeshPool
from serving.recovery.recovery_state import RecoveryState
from simulation.virtual_time import VirtualTimeLoop

ALL, NONE_LOST = MeshKey((0, 1, 2), 4), MeshKey((0, 1), 4)


@dataclasses.dataclass
class Host:
    """The part of a host's paths that the pool reads."""

    disk: str


@dataclasses.dataclass
class Process:
    """A process that runs the code of a build; `compiling` when nobody waits any more for what it compiles."""

    build: str
    compiling: bool = False

    def leaves_unanswered(self, what: str) -> bool:
        return self.compiling and what == "compile"


class Ranks:
    """Ranks that answer every command, but for those in `failing`, `lost` and `hanging`, and those in `stuck`, which
    answer no Ping either; `disks` has those of other hosts, `builds` the code of ranks that run another, `compiling`
    ranks that still compile for nobody."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, str, MeshKey]] = []
        self.urgent: list[bool] = []
        self.failing: set[int] = set()
        self.lost: set[int] = set()
        self.hanging: set[int] = set()
        self.disks: dict[int, str] = {}
        self.builds: dict[int, str] = {}
        self.aborted: list[tuple[tuple[int, ...], int]] = []
        self.busy: set[int] = set()
        self.stuck: set[int] = set()
        self.compiling: set[int] = set()
        self.silent: list[tuple[int, str]] = []
        self.pinged: list[int] = []

    async def call(self, rank: int, what: str, message) -> link_pb2.Done:
        if what == "ping":
            self.pinged.append(rank)
            await asyncio.sleep(0)
            if rank in self.stuck:
                await asyncio.Event().wait()
            return link_pb2.Done()
        self.calls.append((rank, what, MeshKey.read(message.mesh)))
        if what == "prepare":
            self.urgent.append(message.urgent)
        assert what != "compile" or rank not in self.busy, "a rank compiles one mesh at a time"
        self.busy.add(rank)
        await asyncio.sleep(0)
        self.busy.discard(rank)
        if rank in self.hanging:
            await asyncio.Event().wait()
        if rank in self.lost:
            raise RankLost(rank, "exited")
        if rank in self.failing:
            raise CommandFailed(rank, what, "no")
        return link_pb2.Done(compiled=1)

    async def call_all(self, what: str, messages) -> list[link_pb2.Done]:
        return await asyncio.gather(*(self.call(rank, what, message) for rank, message in messages.items()))

    def abort(self, ranks, epoch: int, *, connecting: int = 0) -> None:
        self.aborted.append((tuple(ranks), connecting))

    def lose_unanswered(self, ranks, what: str, why: str, *, unless_all: bool = False) -> None:
        assert unless_all
        self.silent += [(rank, what) for rank in ranks if rank in self.hanging | self.stuck]

    def host_paths(self, rank: int) -> Host | None:
        return Host(self.disks[rank]) if rank in self.disks else None

    def get(self, rank: int) -> Process:
        return Process(self.builds.get(rank, "one"), rank in self.compiling)

    def of(self, what: str) -> list[tuple[int, MeshKey]]:
        return [(rank, key) for rank, each, key in self.calls if each == what]


def run(case: Callable[[MeshPool, Ranks, RecoveryState], Awaitable[None]]) -> None:
    async def whole() -> None:
        ranks, state = Ranks(), RecoveryState()
        pool = MeshPool(ranks, state, lambda _: None)  # type: ignore[arg-type]
        try:
            await case(pool, ranks, state)
        finally:
            pool.stop()

    asyncio.run(whole())


def test_each_shape_is_compiled_once_for_each_store_of_executables() -> None:
    async def case(pool: MeshPool, ranks: Ranks, state: RecoveryState) -> None:
        ranks.disks = {2: "far"}
        await pool.compile([ALL, NONE_LOST, MeshKey((1, 2), 4), MeshKey((0, 2), 4)])
        by_shape = [(len(key.ranks), "far" if rank == 2 else "front") for rank, key in ranks.of("compile")]
        assert sorted(by_shape) == [(2, "far"), (2, "front"), (3, "far"), (3, "front")]

    run(case)


def test_a_mesh_is_connected_only_after_all_of_its_ranks_have() -> None:
    async def case(pool: MeshPool, ranks: Ranks, state: RecoveryState) -> None:
        await pool.connect(ALL, 3, warm=True)
        assert state.membership.connected == {ALL}
        assert ranks.of("connect") == [(0, ALL), (1, ALL), (2, ALL)]

    run(case)


@pytest.mark.parametrize("shares_memory", [True, False])
def test_when_a_rank_dies_while_a_mesh_connects_the_others_are_let_go(shares_memory: bool) -> None:
    async def case(pool: MeshPool, ranks: Ranks, state: RecoveryState) -> None:
        pool.on_configured(shares_memory=shares_memory)
        ranks.lost = {1}
        with pytest.raises(RankLost):
            await pool.connect(ALL, 3, warm=False)
        assert not state.membership.connected
        assert ranks.aborted == [((0, 2), 1)]
        ranks.lost.clear()
        if shares_memory:
            await pool.connect(NONE_LOST, 3, warm=False)
            assert state.membership.connected == {NONE_LOST}
        else:
            assert state.membership.service_lost
            with pytest.raises(CommandFailed, match="left the coordination service"):
                await pool.connect(NONE_LOST, 3, warm=False)
            state.record(GenerationOpened(2, (0, 1)))
            await pool.connect(NONE_LOST, 4, warm=False)
            assert state.membership.connected == {NONE_LOST}

    run(case)


def test_meshes_are_loaded_ahead_in_order_and_a_failure_leaves_only_its_mesh_out() -> None:
    async def case(pool: MeshPool, ranks: Ranks, state: RecoveryState) -> None:
        ranks.failing = {2}
        pool.load_ahead(NONE_LOST, [MeshKey((0,), 4), ALL, MeshKey((1,), 4)])
        assert not pool.idle
        async with asyncio.timeout(60):
            while pool._loading is None or not pool._loading.done():
                await asyncio.sleep(0)
        assert list(state.membership.loaded) == [MeshKey((0,), 4), MeshKey((1,), 4)]
        assert ranks.of("prepare")[:2] == [(0, NONE_LOST), (1, NONE_LOST)], "what is missing of the mesh in force first"
        assert not any(ranks.urgent)
        assert not pool.idle
        pool.stop()
        assert pool.idle

    run(case)


def test_a_rank_that_hangs_while_it_loads_ahead_is_lost_and_leaves_only_its_meshes_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serving.recovery.mesh_pool, "AHEAD_TIMEOUT_S", 0.02)

    async def case(pool: MeshPool, ranks: Ranks, state: RecoveryState) -> None:
        ranks.hanging = {2}
        pool.load_ahead(NONE_LOST, [ALL, MeshKey((1,), 4)])
        async with asyncio.timeout(60):
            while pool.loading:
                await asyncio.sleep(0)
        assert list(state.membership.loaded) == [MeshKey((1,), 4)]
        assert set(ranks.silent) == {(2, "prepare")}

    run(case)


def test_a_mesh_that_was_not_prepared_is_compiled_and_loaded_before_all_others() -> None:
    async def case(pool: MeshPool, ranks: Ranks, state: RecoveryState) -> None:
        ranks.disks = {1: "far", 2: "far"}
        await pool.build(ALL)
        assert ranks.of("compile") == [(0, ALL), (1, ALL)]
        assert ranks.of("prepare") == [(0, ALL), (1, ALL), (2, ALL)]
        assert all(ranks.urgent)

    run(case)


def test_ranks_that_run_other_code_compile_their_programs_before_a_mesh_with_them_is_loaded() -> None:
    async def case(pool: MeshPool, ranks: Ranks, state: RecoveryState) -> None:
        await pool.load(ALL)
        assert ranks.of("compile") == []
        ranks.builds = {2: "other"}
        await pool.load(ALL)
        assert ranks.of("compile") == [(0, ALL), (2, ALL)]
        assert [what for _, what, _ in ranks.calls][3:] == ["compile", "compile", "prepare", "prepare", "prepare"]

    run(case)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_rank_that_hangs_while_it_compiles_in_an_upgrade_is_lost(
    monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    monkeypatch.setattr(serving.recovery.mesh_pool, "COMPILE_TIMEOUT_S", 0.02)

    async def case(pool: MeshPool, ranks: Ranks, state: RecoveryState) -> None:
        ranks.builds, ranks.hanging = {2: "other"}, {2}
        async with asyncio.timeout(60):
            if ahead:
                pool.load_ahead(NONE_LOST, [ALL])
                while pool.loading:
                    await asyncio.sleep(0)
            else:
                with pytest.raises(TimeoutError, match="no answer to compile"):
                    await pool.load(ALL, urgent=True)
        assert ranks.silent == [(2, "compile")]
        assert not state.membership.loaded

    run(case)


def test_a_rank_that_is_stuck_is_lost_before_it_is_waited_for_as_long_as_a_compile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serving.recovery.mesh_pool, "PING_TIMEOUT_S", 0.02)

    async def case(pool: MeshPool, ranks: Ranks, state: RecoveryState) -> None:
        ranks.stuck = ranks.hanging = {0}
        async with asyncio.timeout(60):
            with pytest.raises(TimeoutError, match="no answer to ping"):
                await pool.build(ALL)
        assert ranks.silent == [(0, "ping")]
        assert ranks.of("compile") == []

    run(case)


def test_a_rank_that_still_compiles_for_nobody_is_not_asked_first() -> None:
    async def case(pool: MeshPool, ranks: Ranks, state: RecoveryState) -> None:
        ranks.stuck = ranks.compiling = {0}
        await pool.build(ALL)
        assert ranks.pinged == []
        ranks.stuck = ranks.compiling = set()
        await pool.build(NONE_LOST)
        assert ranks.pinged == [0]
        assert ranks.of("compile") == [(0, ALL), (0, NONE_LOST)]

    run(case)


def test_to_compile_in_an_upgrade_is_no_part_of_the_time_to_load_ahead() -> None:
    class Slow(Ranks):
        async def call(self, rank: int, what: str, message) -> link_pb2.Done:
            if what == "compile":
                await asyncio.sleep(2 * serving.recovery.mesh_pool.AHEAD_TIMEOUT_S)
            return await super().call(rank, what, message)

    async def case() -> None:
        ranks, state, said = Slow(), RecoveryState(), list[str]()
        ranks.builds = {2: "other"}
        pool = MeshPool(ranks, state, said.append)  # type: ignore[arg-type]
        pool.load_ahead(NONE_LOST, [ALL])
        while pool.loading:
            await asyncio.sleep(1.0)
        assert list(state.membership.loaded) == [ALL], said

    loop = VirtualTimeLoop(max_turns=10_000)
    try:
        loop.run_until_complete(case())
    finally:
        loop.close()


def test_a_loaded_mesh_is_taken_once_in_the_order_of_loading() -> None:
    async def case(pool: MeshPool, ranks: Ranks, state: RecoveryState) -> None:
        for mesh in (ALL, NONE_LOST):
            state.record(MeshLoaded(mesh))
        assert [pool.take_loaded(), pool.take_loaded()] == [ALL, NONE_LOST]
        assert pool.idle

    run(case)
