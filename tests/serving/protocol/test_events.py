import ast
import asyncio
import json
import re
from pathlib import Path

import pytest

from serving.api.grpc.resilience_messages import event_from_proto, event_to_proto
from serving.protocol.events import RETAINED_EVENTS, Event, EventKind, EventLog, Severity

ROOT = Path(__file__).parents[3]
EMITTERS = ("core", "recovery")
"""Rooms that emit events; others only read them."""


def kinds_named(*rooms: str) -> set[str]:
    """Members of EventKind that the code of some rooms names."""
    files = (file for room in rooms for file in (ROOT / "serving" / room).rglob("*.py"))
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text())))
    return {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "EventKind"
    }


def test_every_kind_is_emitted_and_nothing_else_is():
    assert kinds_named(*EMITTERS) == set(EventKind.__members__)


def test_every_kind_is_documented_and_nothing_else_is():
    text = (ROOT / "docs" / "observability.md").read_text()
    section = re.search(r"\n## Events\n(.*?)\n## ", text, re.DOTALL)
    assert section is not None
    documented = re.findall(r"^\| `(\w+)` \|", section[1], re.MULTILINE)
    assert documented == [kind.value for kind in EventKind]


def test_a_kind_is_named_as_on_the_wire():
    for kind in EventKind:
        assert kind.value == kind.name.lower()
        event = EventLog().emit(kind, 1, rank=2, phases={"adopt": 3.0})
        assert json.loads(json.dumps({"kind": event.kind})) == {"kind": kind.value}
        assert event_from_proto(event_to_proto(event)) == event


def test_the_severity_of_an_event_is_that_of_its_kind_and_crosses_the_wire():
    assert {kind.severity for kind in EventKind} == set(Severity)
    opposites = {"healed": "masked", "journal_back": "journal_failed", "cleared": "suspected", "restored": "damaged"}
    for good, bad in opposites.items():
        assert (EventKind(good).severity, EventKind(bad).severity) == (Severity.GOOD, Severity.BAD)
    for kind in EventKind:
        assert (kind.severity == Severity.BAD) >= kind.endswith(("_failed", "_lost", "_unreadable"))
        sent = event_to_proto(EventLog().emit(kind, 1))
        assert sent.severity == event_from_proto(sent).severity == kind.severity
        sent.ClearField("severity")  # of a server of 0.1.0
        assert event_from_proto(sent).severity == kind.severity


def test_what_is_no_kind_cannot_be_emitted_but_can_be_read_of_a_newer_server():
    with pytest.raises(ValueError, match="rank_exploded"):
        EventLog().emit("rank_exploded", 1)  # type: ignore[arg-type]
    event = Event(sequence=1, time=0.0, kind="rank_exploded", epoch=1)
    assert event_from_proto(event_to_proto(event)) == event


def test_a_late_watcher_gets_the_retained_events_and_then_each_as_it_comes():
    async def scenario():
        log = EventLog()
        for _ in range(RETAINED_EVENTS + 5):
            log.emit(EventKind.SLOW, 1)
        watch = log.watch(after=RETAINED_EVENTS + 2)
        first = [(await anext(watch)).sequence for _ in range(3)]
        asyncio.get_running_loop().call_soon(log.emit, EventKind.READY, 1)
        return log, first, (await anext(watch)).kind

    log, first, then = asyncio.run(scenario())
    assert [event.sequence for event in log.retained()] == list(range(7, RETAINED_EVENTS + 7))
    assert first == [RETAINED_EVENTS + 3, RETAINED_EVENTS + 4, RETAINED_EVENTS + 5]
    assert then == EventKind.READY
