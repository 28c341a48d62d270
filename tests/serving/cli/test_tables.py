"""Events as lines of a terminal."""

from serving.cli.tables import event_line
from serving.protocol.events import EventKind, EventLog, Severity


def test_an_event_has_the_colour_of_its_severity_and_columns_are_aligned():
    lines = {kind: event_line(EventLog().emit(kind, 1)) for kind in EventKind}
    colours = {Severity.BAD: "red", Severity.GOOD: "green", Severity.NEUTRAL: "bold"}
    for kind, line in lines.items():
        assert [str(span.style) for span in line.spans][1] == colours[kind.severity]
    assert len({line.plain.index("  epoch") for line in lines.values()}) == 1
