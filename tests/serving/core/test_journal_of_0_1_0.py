"""A journal that moejax 0.1.0 wrote is read by this release, value for value."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from serving.core.journal import Journal
from serving.core.request_log import RequestLog
from serving.errors import InvalidRequest, NoCapacity
from serving.protocol.request import Call, Finished, Request, Scored, Token
from serving.protocol.sampling import StructuredOutputs

OLD = Path(__file__).parent / "journal_of_0_1_0" / "requests.journal"
WALL, CLOCK = 1_700_000_000.0, 100.0
"""Where the clocks of the front stood that wrote it, in seconds."""

DEFAULTS: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "stop_tokens": frozenset(),
    "deadline": None,
    "min_tokens": 0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": (),
    "top_logprobs": 0,
    "prompt_logprobs": None,
    "structured_outputs": None,
    "priority": 0,
    "owner": "",
    "share": 1.0,
    "prompt_group": "",
}
REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {"prompt": (1, 2, 3), "max_tokens": 5, "seed": 7},
    "full": {
        "prompt": (9, 8, 7, 6),
        "max_tokens": 40,
        "seed": 2**31 - 1,
        "temperature": 0.7,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.05,
        "stop_tokens": frozenset({5, 2}),
        "deadline": 160.5,
        "min_tokens": 3,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.25,
        "repetition_penalty": 1.1,
        "logit_bias": ((3, -1.5), (11, 100.0)),
        "top_logprobs": 2,
        "prompt_logprobs": 1,
        "structured_outputs": StructuredOutputs("json", '{"type": "object"}'),
        "priority": -2,
        "owner": "key-1",
        "share": 2.5,
        "prompt_group": "full",
    },
    "full-1": {
        "prompt": (9, 8, 7, 6),
        "max_tokens": 40,
        "seed": 0,
        "owner": "key-1",
        "share": 2.5,
        "prompt_group": "full",
        "structured_outputs": StructuredOutputs("regex", "[a-z]+"),
    },
    "tools": {
        "prompt": (4,),
        "max_tokens": 1,
        "seed": 3,
        "structured_outputs": StructuredOutputs("lark", "start: /a/"),
    },
    "choice": {
        "prompt": (4, 5),
        "max_tokens": 2,
        "seed": 4,
        "temperature": 0.0,
        "structured_outputs": StructuredOutputs("choice", '["yes", "no"]'),
    },
    "failed": {"prompt": (1,), "max_tokens": 2, "seed": 1},
    "busy": {"prompt": (1,), "max_tokens": 2, "seed": 1},
    "gone": {"prompt": (1,), "max_tokens": 2, "seed": 1},
    "scored": {"prompt": (1, 2, 3), "max_tokens": 0, "seed": 1, "prompt_logprobs": 2},
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "é"}], "n": 2, "tools": TOOLS}
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "full": {
        "stop": ("\n\n", "é"),
        "owner": "key-1",
        "created": 1_699_999_999,
        "form": {"chat": True, "body": BODY},
    },
    "tools": {"form": {"tools": True}},
    "choice": {"form": {"chat": False, "body": {"prompt": "a", "max_tokens": 2}}},
    "failed": {},
    "busy": {},
    "gone": {},
    "scored": {},
}
ITEMS: dict[str, tuple[Any, ...]] = {
    "plain": (
        Token(0, 17, -0.5, 0),
        Token(1, 18, -1 / 3, 2, degraded=True, top=((18, -1 / 3), (3, -2.5)), cached_tokens=32),
    ),
    "full": (
        Scored(1, (-0.25, -math.inf), (((4, -0.25), (1, -2.0)), ())),
        Scored(3, (-1.0,), (((6, -1.0),),)),
        Token(0, 21, -0.0, 3, cached_tokens=2),
    ),
    "full-1": (Token(0, 22, -0.125, 3), Finished("stop", 2)),
    "tools": (Token(0, 97, -0.75, 3), Finished("length")),
    "choice": (Finished("deadline"),),
    "gone": (Finished("cancelled"),),
    "scored": (
        Scored(1, (-0.5, -0.75), (((2, -0.5), (9, -1.0)), ((3, -0.75), (9, -1.5)))),
        Finished("length"),
    ),
}


def opened(folder: Path) -> RequestLog:
    journal, records = Journal.open(folder)
    return RequestLog(journal, records, clock=lambda: CLOCK, wall=lambda: WALL)


@pytest.fixture(params=["as it was", "after a compaction by this release"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> RequestLog:
    shutil.copy(OLD, tmp_path)
    found = opened(tmp_path)
    if request.param != "as it was":
        found.close()
        found = opened(tmp_path)
    return found


def call(log: RequestLog, name: str) -> Call:
    return log.find_call(name, CALLS[name].get("owner", ""))


def value(request: Request, field: str) -> Any:
    """A field of a request, which may stand in its sampling parameters."""
    holder = request if hasattr(request, field) else getattr(request, "sampling", None)
    return getattr(holder, field)


def test_every_value_of_every_call_is_read(log):
    assert [found.id for found in log.running()] == ["plain", "full"]
    for name, fields in CALLS.items():
        found = call(log, name)
        expected = {"id": name, "stop": (), "owner": "", "form": None, "created": 0} | fields
        assert {key: getattr(found, key) for key in expected} == expected


def test_every_value_of_every_request_is_read(log):
    found = {request.id: request for name in CALLS for request in call(log, name).requests}
    assert found.keys() == REQUESTS.keys()
    for name, fields in REQUESTS.items():
        expected = DEFAULTS | fields
        assert {key: value(found[name], key) for key in expected} == expected
        for key, given in expected.items():
            assert type(value(found[name], key)) is type(given), key


def test_every_value_of_every_answer_is_read(log):
    for name, items in ITEMS.items():
        assert tuple(map(repr, log.items(name))) == tuple(map(repr, items))  # -0.0 and -inf too
    (failed,), (busy,) = log.items("failed"), log.items("busy")
    assert isinstance(failed, NoCapacity)
    assert (str(failed), failed.retry_after_s, failed.param) == ("no rank", 2.0, None)
    assert isinstance(busy, InvalidRequest)
    assert (str(busy), busy.retry_after_s, busy.param) == ("too much", None, "top_p")
    assert log.epoch == 3


def test_a_deadline_is_the_same_moment_on_the_clock_of_this_front(tmp_path):
    shutil.copy(OLD, tmp_path)
    journal, records = Journal.open(tmp_path)
    later = RequestLog(journal, records, clock=lambda: 5000.0, wall=lambda: WALL + 10.0)  # ten seconds after
    assert call(later, "full").requests[0].deadline == pytest.approx(5000.0 - 10.0 + 60.5)
