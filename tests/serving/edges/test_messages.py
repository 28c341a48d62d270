"""Messages come out as they went in."""

import dataclasses

import pytest

from serving.edges import messages
from serving.errors import Internal, QueueFull
from serving.protocol.events import EventKind, EventLog
from serving.protocol.request import Finished, Scored, Token
from tests.serving.edges.test_stream_reader import SCORED
from tests.support.fake_backend import MODEL


@pytest.mark.parametrize(
    "message",
    [
        messages.Welcome(version=1, model=MODEL, resumable=True),
        messages.TokenItem(stream=1, token=Token(0, 5, -0.5, 3, True, ((5, float("-inf")),), 7), first_step_at=1.5),
        messages.ScoredItem(stream=2, scored=SCORED),
        messages.FinishedItem(stream=3, finished=Finished("deadline", 2)),
        messages.Goodbye(),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_message_of_the_front_comes_out_as_it_went_in(message: messages.EdgeMessage) -> None:
    assert messages.decode_from_front(messages.encode(message)) == message


def test_an_event_comes_out_as_it_went_in_also_of_a_kind_that_only_a_newer_front_knows() -> None:
    event = EventLog(41).emit(EventKind.EDGE_LOST, 2, rank=1, phases={"adopt": 2.0}, message="pid 5")
    assert event.sequence == 42
    for each in (event, dataclasses.replace(event, kind="unheard_of")):
        sent = messages.decode_from_front(messages.encode(messages.EventItem(stream=1, event=dataclasses.asdict(each))))
        assert isinstance(sent, messages.EventItem)
        assert messages.event_of(sent.event) == each


def test_an_error_comes_out_as_it_went_in_and_an_unknown_one_is_internal() -> None:
    error = messages.error_of(messages.failed(1, QueueFull("full", param="n", retry_after_s=1.5)))
    assert (type(error), str(error), error.param, error.retry_after_s) == (QueueFull, "full", "n", 1.5)
    assert type(messages.error_of(messages.Failed(stream=1, error="Unheard", text="x"))) is Internal


def test_a_scored_item_has_its_type() -> None:
    assert isinstance(SCORED, Scored)
