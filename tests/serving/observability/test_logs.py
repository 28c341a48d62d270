"""Logs: lines for people, objects for machines."""

import io
import json
import logging

import pytest

from serving.observability.logs import REQUESTS, SERVER, configure, log_event
from serving.protocol.events import Event
from serving.protocol.sampling import SamplingParams


@pytest.fixture
def out():
    root, levels = logging.getLogger(), {name: logging.getLogger(name).level for name in ("", "moejax", "serving")}
    handlers = list(root.handlers)
    yield io.StringIO()
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


RECOVERED = Event(sequence=3, time=1.0, kind="recovered", epoch=2, rank=1, cause="exit", phases={"adopt": 12.5})


def test_an_event_as_json_has_its_fields(out):
    configure("json", "info", out)
    log_event(RECOVERED)
    line = json.loads(out.getvalue())
    assert (line["event"], line["epoch"], line["rank"], line["phases_ms"]) == ("recovered", 2, 1, {"adopt": 12.5})
    assert line["level"] == "info"
    assert line["time"].endswith("Z")


def test_an_event_as_text_is_one_line(out):
    configure("text", "info", out)
    log_event(RECOVERED)
    assert out.getvalue().endswith("s] recovered; epoch 2; rank 1; exit; adopt 12.5 ms\n")


def test_a_loss_is_a_warning_and_below_the_level_nothing_is_written(out):
    configure("text", "warning", out)
    log_event(RECOVERED)
    log_event(Event(sequence=1, time=1.0, kind="rank_lost", epoch=2, rank=1))
    assert out.getvalue().count("\n") == 1
    assert "warning: rank lost" in out.getvalue()


def test_a_traceback_stays_inside_its_object(out):
    configure("json", "info", out)
    try:
        raise ValueError("what went wrong")
    except ValueError:
        SERVER.exception("it broke")
    line = json.loads(out.getvalue())
    assert "ValueError: what went wrong" in line["exception"]


@pytest.mark.anyio
async def test_each_request_is_logged_once_at_level_debug(out, processor):
    configure("json", "debug", out)
    request = await processor.accept("ab", SamplingParams(max_tokens=3), request_id="r1")
    _ = [item async for item in processor.stream(request)]
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    told = [line for line in lines if line["logger"] == REQUESTS.name]
    assert len(told) == 1
    assert (told[0]["request_id"], told[0]["completion_tokens"], told[0]["reason"]) == ("r1", 3, "length")
