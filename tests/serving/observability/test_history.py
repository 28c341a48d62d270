"""The history of a server: seconds and minutes of its figures."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from serving.observability.history import MINUTES, SECONDS, History
from tests.support.fake_backend import FakeBackend

STATUS = FakeBackend().status()


def status(*, tokens=0, failed=0, running=0, dead=0):
    """A status with these figures, of which some ranks are dead."""
    ranks = [dataclasses.replace(r, state="dead" if i < dead else "serving") for i, r in enumerate(STATUS.ranks)]
    return dataclasses.replace(STATUS, tokens=tokens, failed=failed, running=running, ranks=tuple(ranks))


@given(st.lists(st.tuples(st.floats(0.5, 40.0), st.integers(0, 50), st.integers(0, 2)), min_size=1, max_size=100))
def test_seconds_and_minutes_have_all_failures_and_the_same_tokens(steps):
    history, at, tokens, failed = History(), 1e9, 0, 0
    history.add(at, status())
    for seconds, made, broke in steps:
        at, tokens, failed = at + seconds, tokens + made, failed + broke
        history.add(at, status(tokens=tokens, failed=failed))
    by_second, by_minute = history.columns(minutes=False), history.columns(minutes=True)
    assert len(by_second["at"]) == len(steps)
    assert sum(by_second["failed"]) == sum(by_minute["failed"]) == failed
    assert by_second["at"] == sorted(by_second["at"])
    counted = sum(rate * step[0] for rate, step in zip(by_second["tokens_per_s"], steps, strict=True))
    assert abs(counted - tokens) <= 0.01 * sum(step[0] for step in steps)


def test_a_minute_has_its_worst_second():
    history = History()
    for second in range(60):
        history.add(6e8 + second, status(running=second % 7, dead=2 if second == 30 else 0))
    (minute,) = history.columns(minutes=True)["serving"]
    assert minute == len(STATUS.ranks) - 2
    assert history.columns(minutes=True)["running"] == [6]


def test_it_keeps_ten_minutes_and_a_day():
    history = History()
    for second in range(SECONDS + 100):
        history.add(6e8 + second, status())
    assert len(history.columns(minutes=False)["at"]) == SECONDS
    for minute in range(MINUTES + 100):
        history.add(7e8 + 60 * minute, status())
    assert len(history.columns(minutes=True)["at"]) == MINUTES + 1


def test_a_clock_that_was_set_back_adds_nothing():
    history = History()
    for at in (10.0, 9.0, 11.0):
        history.add(at, status(tokens=int(at)))
    assert len(history.columns(minutes=False)["at"]) == 1
