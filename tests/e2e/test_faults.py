"""Beyond crashes: planned changes, damaged weights, slow ranks, the coordinator. No token is lost or wrong."""

import asyncio
import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import serving.recovery.rendezvous
from benchmarks.stuck import StuckProgram
from serving.api.client import Client
from serving.errors import NoCapacity
from serving.recovery.rendezvous import Rendezvous
from serving.server import Server
from tests.e2e.conftest import FEW_BUCKETS, TINY
from tests.support.streams import Traffic, events_since, last_event, pid_of, wait_until, wait_until_whole


@pytest.fixture(scope="module")
def pair() -> Iterator[Server]:
    """Two ranks of the tiny model, with the usual buckets."""
    with Server(model=str(TINY), ranks=2, chaos=True, scrub_s=8.0) as server:
        yield server


@pytest.fixture
def client(pair: Server) -> Iterator[Client]:
    """A client, once both ranks serve and the loss of either is prepared."""
    with Client(pair) as client:
        wait_until_whole(client)
        yield client
        assert client.status().running == 0


@pytest.fixture(scope="module")
def known(pair: Server) -> Traffic:
    """Six streams, and what each says when nothing happens."""
    with Client(pair) as client:
        wait_until_whole(client)
        return Traffic.record(client, streams=6, prompt_tokens=40, max_tokens=80)


def kinds_since(client: Client, sequence: int) -> list[str]:
    """Kinds of the events above a sequence."""
    return [event.kind for event in events_since(client, sequence)]


def busiest(client: Client) -> int:
    """The rank with the most requests now."""
    return max(client.status().ranks, key=lambda rank: rank.running).id


def test_a_drained_rank_hands_over_its_requests_and_computes_nothing_again(client: Client, known: Traffic) -> None:
    before, recoveries = last_event(client), client.status().recoveries

    def drain() -> None:
        rank = busiest(client)
        moved = client.status().ranks[rank].running
        assert moved > 0
        client.apply("drain", rank, replace=True)
        now = client.status()
        assert now.waiting == 0
        assert now.ranks[1 - rank].running >= moved - 1

    known.during(client, drain)
    kinds = kinds_since(client, before)
    assert "drained" in kinds
    assert "rank_lost" not in kinds
    assert client.status().recoveries == recoveries
    wait_until_whole(client)
    assert client.status().compiles_after_ready == 0


def test_scaling_down_and_up_again_changes_no_token(client: Client, known: Traffic) -> None:
    def down() -> None:
        assert client.apply("scale_down", to=1) == [0]

    def up() -> None:
        assert client.status().ranks[1].state == "out"
        assert client.apply("scale_up", to=2) == [0, 1]

    known.during(client, down, up)
    with pytest.raises(NoCapacity, match="would leave no rank"):
        client.apply("scale_down", 0, 1)


def test_a_pause_holds_the_streams_and_a_retry_lets_them_go_on(client: Client, known: Traffic) -> None:
    def pause() -> None:
        try:
            client.apply("pause")
            steps = client.status().steps
            time.sleep(0.3)
            assert client.status().steps == steps
            assert not client.status().ready
        finally:
            client.apply("retry")

    known.during(client, pause)


def test_a_rank_killed_while_it_is_drained_changes_no_token(client: Client, known: Traffic) -> None:
    threads = []

    def drain_and_kill() -> None:
        rank = busiest(client)
        pid = pid_of(client.status(), rank)
        threads.append(threading.Thread(target=lambda: client.apply("drain", rank, replace=True)))
        threads[0].start()
        os.kill(pid, signal.SIGKILL)

    known.during(client, drain_and_kill)
    threads[0].join(60)
    assert not threads[0].is_alive()


@pytest.mark.parametrize("level", [2, 3, 5])
def test_a_device_error_of_any_level_changes_no_token(client: Client, known: Traffic, level: int) -> None:
    known.during(client, lambda: client.report(busiest(client), level, code="0xA1"))
    wait_until_whole(client)


def test_an_isolated_rank_stays_out_until_somebody_scales_up(client: Client, known: Traffic) -> None:
    known.during(client, lambda: client.report(1, 6))
    wait_until(lambda: client.status().ranks[1].state == "out", "the rank is out")
    assert client.apply("scale_up", 1) == [0, 1]


def test_weights_that_are_no_numbers_send_no_wrong_token_and_are_restored(client: Client, known: Traffic) -> None:
    before, restored = last_event(client), client.status().restored
    known.during(client, lambda: client.kill(busiest(client), "NAN"))
    kinds = kinds_since(client, before)
    assert kinds.count("poisoned") >= 1
    assert "damaged" in kinds
    assert "rank_lost" not in kinds
    assert client.status().restored == restored + 1
    assert client.status().masked == ()


def test_connections_that_are_cut_between_living_ranks_cost_no_rank_no_request_and_no_token(
    client: Client, known: Traffic
) -> None:
    before, status = last_event(client), client.status()
    known.during(client, lambda: client.kill(busiest(client), "LINKS"))
    kinds, after = kinds_since(client, before), client.status()
    assert kinds.count("step_failed") == 1
    assert {"rank_lost", "suspected"}.isdisjoint(kinds)
    assert [rank.pid for rank in after.ranks] == [rank.pid for rank in status.ranks]
    assert after.generation == status.generation, "ranks that share memory connect again without a new generation"
    assert after.compiles_after_ready == 0
    known.during(client, lambda: os.kill(pid_of(client.status(), 1), signal.SIGKILL))


def test_a_flipped_bit_is_found_by_the_scrub_and_put_right(client: Client, known: Traffic) -> None:
    before = last_event(client)
    client.kill(0, "BITFLIP")
    wait_until(lambda: "restored" in kinds_since(client, before), "the scrub has restored the weights", 30)
    known.during(client)


def test_the_coordinator_may_die_and_the_next_replacement_costs_a_new_generation(
    pair: Server, client: Client, known: Traffic
) -> None:
    assert pair.app is not None
    for _ in range(2):  # the second time, a loss has cut off an exchange before
        wait_until_whole(client)
        coordinator = pair.app.failover.coordinator_pid
        assert coordinator is not None
        pids = [pid_of(client.status(), rank) for rank in (0, 1)]
        before = client.status()
        known.during(client, lambda pid=coordinator: os.kill(pid, signal.SIGKILL))
        after = client.status()
        assert [pid_of(after, rank) for rank in (0, 1)] == pids
        assert (after.generation, after.epoch, after.lattice) == (before.generation, before.epoch, before.lattice)
        known.during(client, lambda pid=pids[0]: os.kill(pid, signal.SIGKILL))
        wait_until_whole(client)
        assert client.status().generation == before.generation + 1


def test_the_loss_of_a_whole_host_is_prepared_and_changes_no_token() -> None:
    like_others = {"slots_per_rank": 4, "buckets": FEW_BUCKETS}  # programs of `test_certificate`
    with (
        Server(model=str(TINY), ranks=4, hosts=2, lattice_depth=1, chaos=True, restart=False, **like_others) as server,
        Client(server) as client,
    ):
        wait_until_whole(client)
        assert [rank.host for rank in client.status().ranks] == ["host0", "host0", "host1", "host1"]
        wait_until(lambda: client.what_if()[-1].prepared, "the loss of a host is prepared")
        known = Traffic.record(client, streams=4, prompt_tokens=40, max_tokens=40)
        known.during(client, lambda: client.kill(0, host="host1"))
        assert [rank.state for rank in client.status().ranks] == ["serving", "serving", "dead", "dead"]
        assert client.status().compiles_after_ready == 0


def test_lost_experts_are_masked_and_reported_until_they_are_loaded() -> None:
    settings = {"on_lost_expert": "mask", "slots_per_rank": 4, "restart": False, "buckets": FEW_BUCKETS}
    with Server(model=str(TINY), ranks=3, chaos=True, **settings) as server, Client(server) as client:
        wait_until_whole(client)
        known = Traffic.record(client, streams=4, prompt_tokens=40, max_tokens=60)
        streams = [stream.again() for stream in known.known]
        threads = [threading.Thread(target=stream.run, args=(client,)) for stream in streams]
        for thread in threads:
            thread.start()
        wait_until(lambda: client.status().running == 4, "all streams run")
        client.kill(2)
        for thread in threads:
            thread.join(60)
        assert [stream.error for stream in streams] == [None] * 4
        assert [len(stream.tokens) for stream in streams] == [60] * 4
        kinds = kinds_since(client, 0)
        assert kinds.index("masked") < kinds.index("healed")
        assert client.status().degraded > 0
        assert client.status().masked == ()
        degraded = client.status().degraded
        known.during(client)
        assert client.status().degraded == degraded


def test_a_store_that_cannot_be_read_masks_what_is_lost_and_heals_when_it_can(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    settings = {"slots_per_rank": 4, "chaos": True, "restart": False, "buckets": FEW_BUCKETS}
    with Server(model=str(folder), ranks=3, **settings) as server:
        assert server.app is not None
        with Client(server) as client:
            wait_until_whole(client)
            known = Traffic.record(client, streams=2, prompt_tokens=40, max_tokens=40)
            chunks = Path(server.app.failover.model.store) / "params"
            chunks.rename(chunks.with_name("gone"))
            before = last_event(client)
            client.kill(2)
            wait_until(lambda: "store_unreadable" in kinds_since(client, before), "the alarm is given")
            assert client.generate("ROMEO:", max_tokens=8, ignore_eos=True).completion_tokens == 8
            assert client.status().masked != ()
            chunks.with_name("gone").rename(chunks)
            wait_until(lambda: client.status().masked == (), "all experts are healed")
            known.during(client)


@pytest.mark.slow  # pace is judged over minutes, on a machine that does nothing else
def test_a_rank_that_is_slow_for_long_is_drained_and_replaced_and_no_token_changes() -> None:
    settings = {"slow_block_steps": 20, "slow_factor": 1.8, "drain_slow": True}
    with Server(model=str(TINY), ranks=3, **settings) as server, Client(server) as client:
        wait_until_whole(client)
        known = Traffic.record(client, streams=6, prompt_tokens=40, max_tokens=100)
        over = threading.Event()

        def hold_up() -> None:
            """Nine tenths of the time its process stands still; on a busy machine so long that it is taken for hung,
            and the next one stands still instead."""
            while not over.is_set():
                slow = client.status().ranks[1].pid
                with contextlib.suppress(ProcessLookupError):
                    while slow is not None and not over.wait(0.003):
                        os.kill(slow, signal.SIGSTOP)
                        time.sleep(0.027)
                        os.kill(slow, signal.SIGCONT)

        def is_drained() -> bool:
            known.during(client)
            return "drained" in kinds_since(client, 0)

        thread = threading.Thread(target=hold_up)
        thread.start()
        try:
            wait_until(is_drained, "the slow rank is drained", 150)
        finally:
            over.set()
            thread.join()
        kinds = kinds_since(client, 0)
        assert kinds.index("slow") < kinds.index("drained")
        wait_until_whole(client)
        known.during(client)


def test_what_if_says_for_each_rank_what_its_loss_would_cost(client: Client, known: Traffic) -> None:
    told = []
    known.during(client, lambda: told.extend(client.what_if()))
    assert [p.ranks for p in told] == [(0,), (1,), (0, 1)]
    assert [p.survivable for p in told] == [True, True, False]
    assert all(p.prepared for p in told[:2])
    assert sum(p.requests_moved for p in told[:2]) == told[2].requests_moved > 0
    assert all(p.stall_ms > 0 for p in told[:2])


@pytest.fixture(scope="module")
def three() -> Iterator[Server]:
    """Three ranks of the tiny model."""
    with Server(model=str(TINY), ranks=3, buckets=FEW_BUCKETS, lattice_depth=1) as server:
        yield server


def break_generation(server: Server) -> None:
    """Have the ranks form a new generation."""
    assert server.app is not None
    loop = server.app.loop
    assert loop._task is not None

    def act() -> None:
        loop.failover.mark_comm_broken()
        loop.engine.wake()

    loop._task.get_loop().call_soon_threadsafe(act)


def test_a_rank_that_is_stuck_when_a_generation_is_formed_is_lost_alone(
    three: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving.recovery.rendezvous, "PING_TIMEOUT_S", 3.0)
    with Client(three) as client:
        wait_until_whole(client)
        before, generation, kept = last_event(client), client.status().generation, pid_of(client.status(), 0)
        stuck = StuckProgram(pid_of(client.status(), 1))
        break_generation(three)
        stuck.release()  # once it is killed
        wait_until(lambda: "recovered" in kinds_since(client, before), "the others have formed a generation")
        lost = [event for event in events_since(client, before) if event.kind == "rank_lost"]
        assert [event.rank for event in lost] == [1]
        assert "no answer to ping" in lost[0].cause
        wait_until_whole(client)
        assert pid_of(client.status(), 0) == kept
        assert client.status().generation > generation


@pytest.mark.parametrize("dies", ["a rank", "the coordination service"])
def test_what_dies_while_ranks_enter_a_generation_takes_no_rank_with_it(
    three: Server, monkeypatch: pytest.MonkeyPatch, dies: str
) -> None:
    join_all, killed = Rendezvous.join_all, list[int]()

    async def join_all_and_kill(rendezvous: Rendezvous, pages_used: Mapping[int, int]) -> None:
        if not killed:
            killed.append(pids[1])
            if dies == "a rank":  # it has answered that it can enter, and does not
                os.kill(pids[1], signal.SIGSTOP)
                asyncio.get_running_loop().call_later(0.5, os.kill, pids[1], signal.SIGKILL)
            elif rendezvous.coordinator is not None:
                await rendezvous.coordinator.stop()
        await join_all(rendezvous, pages_used)

    with Client(three) as client:
        wait_until_whole(client)
        pids = {rank: pid_of(client.status(), rank) for rank in range(3)}
        before = last_event(client)
        monkeypatch.setattr(Rendezvous, "join_all", join_all_and_kill)
        break_generation(three)
        wait_until(lambda: "recovered" in kinds_since(client, before), "the others have formed a generation", 25)
        wait_until_whole(client)
        assert killed
        lost = [event.rank for event in events_since(client, before) if event.kind == "rank_lost"]
        assert lost == ([1] if dies == "a rank" else [])
        assert kinds_since(client, before).count("recovered") == 1
        kept = {rank for rank in pids if pid_of(client.status(), rank) == pids[rank]}
        assert kept == set(pids).difference(lost)
