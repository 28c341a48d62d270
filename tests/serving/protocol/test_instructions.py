"""Instructions and device errors: what is understood, what is refused with both values, and who may ask."""

import asyncio
import json
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.api.client import AsyncClient
from serving.core.background import follow_device_errors, scrub_weights
from serving.errors import InvalidRequest, NoCapacity, NotPermitted
from serving.protocol.instructions import (
    ACTIONS,
    RESPONSE_BY_LEVEL,
    DeviceError,
    ErrorResponse,
    Instruction,
    check_may_operate,
)
from tests.support.fake_backend import FakeBackend
from tests.support.fake_server import serve

HOSTS = {0: "a", 1: "a", 2: "b", 3: "b"}


@pytest.mark.parametrize(
    ("fields", "serving", "ranks"),
    [
        ({"action": "drain", "ranks": (1,)}, (0, 1, 2, 3), (1,)),
        ({"action": "drain", "host": "b"}, (0, 1, 2), (2,)),
        ({"action": "scale_down", "to": 2}, (0, 1, 2, 3), (2, 3)),
        ({"action": "scale_down", "to": 2}, (0, 3), ()),
        ({"action": "scale_up"}, (0, 3), (1, 2)),
        ({"action": "scale_up", "to": 3}, (0, 3), (1,)),
        ({"action": "scale_up", "ranks": (0, 2)}, (0, 3), (2,)),
    ],
)
def test_an_instruction_means_these_ranks(fields, serving, ranks):
    assert Instruction(**fields).select_ranks(HOSTS, serving) == ranks


@pytest.mark.parametrize("fields", [{"ranks": (0, 1, 2, 3)}, {"ranks": (2, 0)}])
def test_nobody_is_let_go_when_nobody_would_be_left(fields):
    with pytest.raises(NoCapacity, match="would leave no rank to serve"):
        Instruction(action="drain", **fields).select_ranks(HOSTS, (0, 2))


@given(
    st.sets(st.sampled_from(sorted(HOSTS)), min_size=1), st.integers(1, 4), st.sampled_from(["scale_down", "scale_up"])
)
def test_scaling_to_a_number_moves_towards_it_and_stops_there(serving, to, action):
    chosen = Instruction(action=action, to=to).select_ranks(HOSTS, serving)
    after = serving | set(chosen) if action == "scale_up" else serving - set(chosen)
    assert len(after) == (max if action == "scale_up" else min)(to, len(serving))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({}, "action is missing"),
        ({"action": "explode"}, "pause, retry, drain"),
        ({"action": "drain"}, "needs ranks or a host"),
        ({"action": "drain", "ranks": [9]}, "no rank 9"),
        ({"action": "drain", "ranks": "1"}, "wrong type"),
        ({"action": "drain", "ranks": [True]}, "list of numbers"),
        ({"action": "drain", "host": "z"}, "hosts are a, b"),
        ({"action": "drain", "ranks": [1], "host": "a"}, "exclude one another"),
        ({"action": "pause", "ranks": [1]}, "whole server"),
        ({"action": "scale_up", "to": 5}, "started with 4"),
        ({"action": "scale_up", "to": 0}, "from 1 on"),
        ({"action": "scale_up", "replace": True}, "replace goes with drain"),
        ({"action": "drain", "ranks": [1], "timeout_s": -1}, "0 to 3600"),
        ({"action": "drain", "rank": 1}, "unknown field 'rank'"),
        ([1], "JSON object"),
    ],
)
def test_what_is_no_instruction_is_refused_and_says_why(value, says):
    with pytest.raises(InvalidRequest, match=says):
        Instruction.from_json(value).select_ranks(HOSTS, (0, 1, 2, 3))


def test_the_names_that_vllm_uses_are_understood():
    read = Instruction.from_json({"fault_tolerance_instruction": "pause", "fault_tolerance_timeout": 5})
    assert (read.action, read.timeout_s) == ("pause", 5)


def test_every_level_has_a_response_and_worse_levels_do_not_do_less():
    order = [
        ErrorResponse.IGNORE,
        ErrorResponse.RECOMPUTE,
        ErrorResponse.DRAIN,
        ErrorResponse.RESTART,
        ErrorResponse.ISOLATE,
    ]
    assert sorted(RESPONSE_BY_LEVEL) == [1, 2, 3, 4, 5, 6]
    assert [order.index(RESPONSE_BY_LEVEL[level]) for level in sorted(RESPONSE_BY_LEVEL)] == [0, 1, 2, 2, 3, 4]


@pytest.mark.parametrize("level", ["L0", "L7", "five", 0, 7, None, True, 2.0])
def test_an_unknown_level_is_refused(level):
    with pytest.raises(InvalidRequest, match="L1 to L6"):
        DeviceError.from_json({"rank": 0, "level": level})


@pytest.mark.parametrize(
    ("chaos", "operable", "key", "peer", "may"),
    [
        (False, False, "", "127.0.0.1", False),
        (True, False, "", "127.0.0.1", True),
        (False, True, "", "::1", True),
        (True, True, "", "192.0.2.7", False),
        (True, True, "", "", False),
        (False, False, "operator", "192.0.2.7", True),
    ],
)
def test_who_may_operate_a_server(chaos, operable, key, peer, may):
    if may:
        check_may_operate(chaos=chaos, operable=operable, key=key, peer=peer)
    else:
        with pytest.raises(NotPermitted):
            check_may_operate(chaos=chaos, operable=operable, key=key, peer=peer)


@pytest.mark.anyio
async def test_both_surfaces_pass_on_the_same_instruction_and_the_same_report(backend: FakeBackend):
    backend.chaos, backend.operable = False, True
    wanted = Instruction(action="drain", ranks=(2,), replace=True, timeout_s=7.0)
    told = DeviceError(rank=1, level=5, code="0xA", message="hot")
    body = {"action": "drain", "ranks": [2], "replace": True, "timeout_s": 7.0}
    report = {"rank": 1, "level": "L5", "code": "0xA", "message": "hot"}
    async with serve(backend) as server, AsyncClient(server.address) as client, httpx.AsyncClient() as web:
        assert await client.apply("drain", 2, replace=True, timeout_s=7.0) == [0, 1, 3]
        answer = await web.post(f"{server.url}/fault_tolerance/apply", json=body)
        assert answer.json() == {"serving": [0, 1, 3], "epoch": 0, "weights_version": "0"}
        assert await client.report(1, 5, "0xA", "hot") == "restart"
        answer = await web.post(f"{server.url}/fault_tolerance/report", json=report)
        assert answer.json() == {"action": "restart"}
        assert backend.applied == [wanted, wanted]
        assert backend.reported == [told, told]
        status = (await web.get(f"{server.url}/fault_tolerance/status")).json()
        prospects = await client.what_if()
        assert [p["ranks"] for p in status["what_if"]] == [list(p.ranks) for p in prospects] == [[0], [1], [2], [3]]
        assert [p["stall_ms"] for p in status["what_if"]] == [p.stall_ms for p in prospects]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"action": "weights"}, "weights needs model"),
        ({"action": "weights", "model": "m", "ranks": (1,)}, "is about the whole server; leave out ranks"),
        ({"action": "weights", "model": "m", "version": "x" * 65}, "at most 64 printable ASCII characters"),
        ({"action": "weights", "model": "m", "running": "stop"}, "running is 'stop'; it must be finish or switch"),
        ({"action": "upgrade"}, "upgrade needs path"),
        ({"action": "upgrade", "path": "/new", "to": 1}, "is about the whole server; leave out to"),
        ({"action": "drain", "ranks": (1,), "python": "/new"}, "python goes with upgrade, not with drain"),
        ({"action": "drain", "ranks": (1,), "model": "m"}, "model goes with weights, not with drain"),
    ],
)
def test_an_instruction_about_weights_says_which(fields, match):
    with pytest.raises(InvalidRequest, match=match):
        Instruction(**fields)


@pytest.mark.anyio
@pytest.mark.parametrize("action", ACTIONS)
async def test_a_server_that_is_not_operable_refuses_every_instruction_on_both_surfaces(
    backend: FakeBackend, action: str
):
    backend.chaos = False
    more = {"weights": {"model": "/models/other"}, "upgrade": {"path": "/new"}}.get(action, {})
    async with serve(backend) as server, AsyncClient(server.address) as client, httpx.AsyncClient() as web:
        answer = await web.post(f"{server.url}/fault_tolerance/apply", json={"action": action, **more})
        assert answer.status_code == 403
        with pytest.raises(NotPermitted, match="--operate"):
            await client.apply(action, **more)
        assert backend.applied == []


@pytest.mark.anyio
async def test_lines_appended_to_the_file_are_reported_once_and_others_said(tmp_path: Path):
    path, reported, said = tmp_path / "errors.jsonl", [], []
    path.write_text(json.dumps({"rank": 0, "level": 1}) + "\n")  # from before: not reported
    task = asyncio.create_task(follow_device_errors(path, reported.append, said.append))

    async def heard(count: int) -> None:
        async with asyncio.timeout(60):
            while len(reported) + len(said) < count:
                await asyncio.sleep(0.02)

    await asyncio.sleep(0)  # it has begun, and knows where the file ends
    with path.open("a") as file:
        file.write('{"rank": 2, "level": "L3"}\nnonsense\n{"rank": 1, "lev')
        file.flush()
        await heard(2)
        file.write('el": 6}\n')
    await heard(3)
    path.write_text('{"rank": 3, "level": 2}\n')
    await heard(4)
    task.cancel()
    assert [(error.rank, error.level) for error in reported] == [(2, 3), (1, 6), (3, 2)]
    assert len(said) == 1
    assert "not JSON" in said[0]


@pytest.mark.anyio
async def test_the_scrub_sees_every_slot_in_turn_also_when_their_number_changes():
    seen, count = [], 3

    async def inspect(number: int) -> None:
        nonlocal count
        seen.append(number)
        count = 3 if len(seen) < 5 else 2

    task = asyncio.create_task(scrub_weights(lambda: count, inspect, 0.006))
    async with asyncio.timeout(60):
        while len(seen) < 9:
            await asyncio.sleep(0.002)
    task.cancel()
    assert seen[:9] == [0, 1, 2, 0, 1, 0, 1, 0, 1]
