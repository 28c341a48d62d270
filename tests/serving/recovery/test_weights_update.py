"""New weights cannot half happen: whatever dies at whichever message, each token is that of its version, and the server
has the old weights or the new ones; what is refused leaves everything as it was."""

import asyncio
import dataclasses
import errno
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import serving.launch.weights_record
import serving.recovery.weights_update
from serving.core.journal import Journal
from serving.core.request_log import RequestLog
from serving.errors import Conflict, InvalidRequest, MoejaxError, NoCapacity
from serving.launch.weights_record import WeightsRecord
from serving.proto.moejax.v1 import link_pb2
from serving.protocol.instructions import Instruction
from serving.protocol.prepared_model import PreparedModel
from serving.protocol.request import Call, Finished, Token
from simulation.hand_model import PREPARED, next_token, small_request
from tests.support.recovery_machine import (
    APART,
    LIMIT_S,
    RANKS,
    SETTINGS,
    Machine,
    at_every_message,
    finish_weights,
    switch_weights,
)

pytestmark = pytest.mark.usefixtures("no_processes")

NEW = Instruction(action="weights", model="fake", version="7")


@asynccontextmanager
async def serving_streams(
    record: WeightsRecord | None = None,
) -> AsyncIterator[tuple[Machine, list[asyncio.Task[None]]]]:
    """A server whose streams are under way."""
    m = Machine(SETTINGS, weights_record=record)
    await m.failover.start()
    m.loop.start()
    clients = [asyncio.create_task(m.read(request)) for request in m.requests]
    try:
        async with asyncio.timeout(LIMIT_S):
            await m.begun(3)
            yield m, clients
            await asyncio.gather(*clients)
    finally:
        await m.loop.drain(0.0)
        await m.failover.close()


def kinds(m: Machine) -> list[str]:
    return [str(event.kind) for event in m.loop.events.retained()]


@pytest.mark.parametrize(("act", "replication"), [(switch_weights, "memory"), (finish_weights, "stream")])
def test_a_loss_at_some_message_of_a_switch_leaves_each_token_that_of_its_version(act, replication) -> None:
    at_every_message(act, {"on_lost_expert": "wait", "kv_replication": replication}, every=3)


def test_nor_does_one_where_experts_are_apart() -> None:
    at_every_message(switch_weights, {"on_lost_expert": "wait", "kv_replication": "memory", **APART}, every=4)


def test_open_streams_go_on_with_the_new_weights() -> None:
    async def main() -> None:
        async with serving_streams() as (m, _):
            await m.loop.apply(NEW)
        assert all({0, 7} == set(versions) for versions in m.weights.values())
        for request in m.requests:
            tokens, versions = m.tokens[request.id], m.weights[request.id]
            first = versions.index(7)
            for at, token in enumerate(tokens):
                number = 0 if at < first else 1
                assert token == next_token((*request.prompt, *tokens[:at]), request.sampling.seed, number)
        assert m.loop.status().weights_version == "7"
        assert m.loop.status().weights_switches == 1
        assert "weights_switched" in kinds(m)

    asyncio.run(main())


def test_with_finish_streams_end_on_the_old_weights_and_later_requests_have_the_new_ones() -> None:
    async def main() -> None:
        async with serving_streams() as (m, clients):
            applying = asyncio.create_task(m.loop.apply(Instruction(action="weights", model="fake", running="finish")))
            while not m.loop.engine.state.held:
                await asyncio.sleep(0)
            late = small_request("late", range(5), max_tokens=6, seed=3)
            m.tokens["late"], m.weights["late"] = [], []
            reading = asyncio.create_task(m.read(late))
            await asyncio.gather(*clients)
            assert m.tokens["late"] == []
            await applying
            await reading
        assert all(set(m.weights[request.id]) == {0} for request in m.requests)
        assert set(m.weights["late"]) == {1}
        m.check_tokens(late)

    asyncio.run(main())


def test_streams_that_do_not_end_in_time_go_on_with_the_new_weights() -> None:
    async def main() -> None:
        async with serving_streams() as (m, _):
            await m.loop.apply(Instruction(action="weights", model="fake", running="finish", timeout_s=0.0))
        assert all({0, 1} == set(versions) for versions in m.weights.values())

    asyncio.run(main())


def test_no_prefix_of_the_old_weights_is_found_by_the_new_ones() -> None:
    async def main() -> None:
        async with serving_streams() as (m, clients):
            await asyncio.gather(*clients)
            await m.loop.apply(Instruction(action="weights", model="fake"))
            assert m.loop.engine.state.root_key != b""
            hits = m.loop.status().prefix_hits
            again = small_request("again", m.requests[0].prompt, max_tokens=4)
            m.tokens["again"], m.weights["again"] = [], []
            await m.read(again)
            assert m.loop.status().prefix_hits == hits
            m.check_tokens(again)

    asyncio.run(main())


async def refused(m: Machine, kind: type[MoejaxError], match: str) -> None:
    with pytest.raises(kind, match=match):
        await m.loop.apply(NEW)
    status = m.loop.status()
    assert (status.weights_version, status.next_weights_version) == ("0", "")
    assert m.failover.membership.next_weights.number == 0
    assert not m.loop.engine.state.held
    assert all(m.executor.get(rank).staged is None for rank in range(RANKS))


def test_weights_that_are_not_the_models_are_refused_and_nothing_moves(monkeypatch) -> None:
    async def other(*_: object, **__: object) -> None:
        raise InvalidRequest("d_model is 96, and that of the served model is 128.", param="model")

    monkeypatch.setattr(serving.recovery.weights_update, "prepare_weights", other)

    async def main() -> None:
        async with serving_streams() as (m, _):
            sent = len([each for each in m.executor.log if each[1] == "stage_weights"])
            await refused(m, InvalidRequest, "d_model is 96")
            assert len([each for each in m.executor.log if each[1] == "stage_weights"]) == sent == 0

    asyncio.run(main())


def test_weights_that_a_rank_cannot_read_are_refused() -> None:
    async def main() -> None:
        async with serving_streams() as (m, _):
            m.executor.store.readable = False
            await refused(m, InvalidRequest, "rank . cannot load fake")
            assert kinds(m)[-1] == "weights_refused"
            m.executor.store.readable = True

    asyncio.run(main())


def test_weights_that_do_not_fit_are_refused_with_both_figures(monkeypatch) -> None:
    monkeypatch.setattr(serving.recovery.weights_update, "free_bytes", lambda: 7)

    async def main() -> None:
        async with serving_streams() as (m, _):
            await refused(m, NoCapacity, "needs . MiB beside those in force .*0 MiB of memory are free")

    asyncio.run(main())


def test_a_decision_that_cannot_be_written_is_none(monkeypatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("serving.launch.weights_record.write_whole", full)

    async def main() -> None:
        async with serving_streams(WeightsRecord(tmp_path, PREPARED.content)) as (m, _):
            await refused(m, NoCapacity, "cannot be written: .*No space left")

    asyncio.run(main())


def test_one_update_runs_at_a_time_and_an_instruction_that_is_withdrawn_leaves_nothing() -> None:
    async def main() -> None:
        async with serving_streams() as (m, _):
            first = asyncio.create_task(m.loop.apply(Instruction(action="weights", model="fake", running="finish")))
            while not m.loop.engine.state.held:
                await asyncio.sleep(0)
            with pytest.raises(Conflict, match="version 1 is being brought in"):
                await m.loop.apply(NEW)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            assert not m.loop.engine.state.held
            assert m.loop.status().next_weights_version == ""
            await m.loop.apply(NEW)
        assert m.loop.status().weights_version == "7"

    asyncio.run(main())


@pytest.mark.parametrize("written", [True, False])
def test_an_instruction_that_is_withdrawn_while_it_is_decided_does_what_the_disk_says(
    monkeypatch, tmp_path: Path, *, written: bool
) -> None:
    begun, goes_on, write_whole = threading.Event(), threading.Event(), serving.launch.weights_record.write_whole

    def slow(path: Path, data: bytes) -> None:
        begun.set()
        assert goes_on.wait(LIMIT_S)
        if not written:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_whole(path, data)

    monkeypatch.setattr(serving.launch.weights_record, "write_whole", slow)

    async def main() -> None:
        async with serving_streams(WeightsRecord(tmp_path, PREPARED.content)) as (m, _):
            applying = asyncio.create_task(m.loop.apply(NEW))
            while not begun.is_set():
                await asyncio.sleep(0)
            for _ in range(2):  # whoever asks may do so again
                applying.cancel()
                for _ in range(5):
                    await asyncio.sleep(0)
            assert m.loop.status().next_weights_version == "7"
            goes_on.set()
            with pytest.raises(asyncio.CancelledError):
                await applying
            assert ("weights_refused" in kinds(m)) is not written
            while m.failover.membership.weights != m.failover.membership.next_weights:
                await asyncio.sleep(0)
        assert m.loop.status().weights_version == ("7" if written else "0")
        assert all(m.executor.get(rank).staged is None for rank in range(RANKS))

    asyncio.run(main())


def test_a_decision_that_is_in_place_stands_although_its_folder_could_not_be_flushed(
    monkeypatch, tmp_path: Path
) -> None:
    write_whole = serving.launch.weights_record.write_whole

    def unsure(path: Path, data: bytes) -> None:
        write_whole(path, data)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(serving.launch.weights_record, "write_whole", unsure)

    async def main() -> None:
        async with serving_streams(WeightsRecord(tmp_path, PREPARED.content)) as (m, _):
            await m.loop.apply(NEW)
            assert m.loop.status().weights_version == "7"

    asyncio.run(main())


def test_an_update_that_a_rank_does_not_load_in_time_is_refused_with_the_ranks_name(monkeypatch) -> None:
    monkeypatch.setattr(serving.recovery.weights_update, "DROP_TIMEOUT_S", 0.01)

    async def main() -> None:
        async with serving_streams() as (m, _):
            call = m.executor.call

            async def hangs(rank: int, what: str, message) -> link_pb2.Done:
                if (rank, what) == (1, "stage_weights"):
                    await asyncio.Event().wait()
                return await call(rank, what, message)

            monkeypatch.setattr(m.executor, "call", hangs)
            m.loop.engine.settings = dataclasses.replace(SETTINGS, start_timeout_s=0.05)
            await refused(m, NoCapacity, r"ranks \[1\] have not loaded weights version 7 within 0.05 s")
            assert kinds(m)[-1] == "weights_refused"

    asyncio.run(main())


class FrontDied(BaseException):
    """Nothing catches it but the end of the front."""


async def front_dies_at(folder: Path, at: int) -> set[int]:
    """The front dies at message `at` of a switch. The versions of the tokens that the next front sent."""
    record, (journal, records) = WeightsRecord(folder, PREPARED.content), Journal.open(folder)
    threads = ThreadPoolExecutor(2)
    asyncio.get_running_loop().set_default_executor(threads)
    first = Machine(SETTINGS, request_log=RequestLog(journal, records), weights_record=record)
    await first.failover.start()
    first.loop.start()
    for request in first.requests:
        first.loop.register_call(Call(id=request.id, requests=(request,)))
    asking = [asyncio.create_task(first.read(request)) for request in first.requests]
    await first.begun(3)
    since, dead = len(first.executor.log), asyncio.Event()

    def dies(number: int, rank: int, what: str) -> None:
        if number == since + at:
            dead.set()
            raise FrontDied

    first.executor.fails = dies
    applying = asyncio.create_task(first.loop.apply(Instruction(action="weights", model="fake")))
    ends = asyncio.gather(applying, *asking, return_exceptions=True)
    await asyncio.wait({ends, asyncio.create_task(dead.wait())}, return_when=asyncio.FIRST_COMPLETED)
    first.loop.engine.request_log.close()
    first.failover.kv_replicas.close()
    running = [applying, *asking, *first.loop.tasks, *first.loop._pipeline.answers]
    running += [first.failover.meshes._loading, first.failover.joining._task, first.failover._rendezvous._monitoring]
    running += asyncio.all_tasks() - {asyncio.current_task()}
    for task in filter(None, running):
        task.cancel()
    await asyncio.gather(*filter(None, running), return_exceptions=True)
    threads.shutdown()  # none of them writes the record later
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
    decided = record.load().number
    had = {key: list(tokens) for key, tokens in first.tokens.items()}

    journal, records = Journal.open(folder)
    second = Machine(SETTINGS, first.executor, RequestLog(journal, records), weights_record=record)
    second.executor.fails = lambda number, rank, what: None
    try:
        await second.failover.start()
        second.loop.start()
        assert second.failover.membership.weights.number == decided
        for request in second.requests:
            items = [item async for item in second.loop.replay(request.id)]
            tokens = [item for item in items if isinstance(item, Token)]
            second.tokens[request.id] = [token.id for token in tokens]
            second.weights[request.id] = [int(token.weights_version) for token in tokens]
            second.check_tokens(request)
            assert second.tokens[request.id][: len(had[request.id])] == had[request.id]
            assert items[-1] == Finished("length")
        assert all(second.executor.get(rank).weights == decided for rank in range(RANKS))
        assert all(second.executor.get(rank).staged is None for rank in range(RANKS))
        assert second.loop.status().failed == 0
        return {version for versions in second.weights.values() for version in versions}
    finally:
        await second.loop.drain(0.0)
        await second.failover.close()


def test_the_front_may_die_at_any_message_of_a_switch(tmp_path: Path) -> None:
    seen: set[int] = set()

    async def main(number: int) -> None:
        async with asyncio.timeout(LIMIT_S):
            seen.update(await front_dies_at(tmp_path / str(number), number))

    for number in range(24):  # more than a switch has
        asyncio.run(main(number))
    assert seen == {0, 1}


def test_a_label_is_never_that_of_two_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = iter(("x", "y", "z", "x"))

    async def prepare(model: str, like: PreparedModel, **_: object) -> PreparedModel:
        return dataclasses.replace(like, store=model, content=next(contents))

    monkeypatch.setattr(serving.recovery.weights_update, "prepare_weights", prepare)

    async def main() -> None:
        async with serving_streams() as (m, _):
            await m.loop.apply(Instruction(action="weights", model="fake", version="2"))
            await m.loop.apply(Instruction(action="weights", model="fake"))
            assert m.loop.status().weights_version == "3"
            with pytest.raises(InvalidRequest, match="other weights had before"):
                await m.loop.apply(Instruction(action="weights", model="fake", version="2"))
            await m.loop.apply(Instruction(action="weights", model="fake", version="2"))
            assert m.loop.status().weights_version == "2"

    asyncio.run(main())


def test_files_of_new_weights_that_are_not_used_are_named_in_the_event(monkeypatch: pytest.MonkeyPatch) -> None:
    unused = iter(((), ("chat_template.jinja", "generation_config.json")))

    async def prepare(model: str, like: PreparedModel, **_: object) -> PreparedModel:
        return dataclasses.replace(like, store=model, content=model, unused_files=next(unused))

    monkeypatch.setattr(serving.recovery.weights_update, "prepare_weights", prepare)

    async def main() -> None:
        async with serving_streams() as (m, _):
            for model in ("first", "second"):
                await m.loop.apply(Instruction(action="weights", model=model))
            said = [each.message for each in m.loop.events.retained() if str(each.kind) == "weights_loading"]
            assert said[0] == "version 1, from first"
            assert said[1].startswith("version 2, from second; chat_template.jinja and generation_config.json of it")

    asyncio.run(main())
