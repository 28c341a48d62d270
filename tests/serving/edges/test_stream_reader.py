"""A stream's items come once and in order, whatever several fronts send of it."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.edges import messages
from serving.edges.stream_reader import StreamReader, after_position
from serving.errors import NoCapacity
from serving.protocol.request import Finished, Scored, Token

SCORED = Scored(1, (-1.0, -2.0, -3.0, -4.0), ((), ((3, -0.5),), (), ()))
TOKENS = [Token(index, index + 5, -0.5, 0) for index in range(6)]


def reader() -> StreamReader:
    return StreamReader(messages.Read(stream=1, call_id="c", request_id="r"))


def taken(stream: StreamReader) -> list:
    items = []
    while not stream._queue.empty():
        items.append(stream._queue.get_nowait())
    return items


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4), st.integers(1, 4)), max_size=6))
def test_items_come_once_from_fronts_that_send_from_anywhere_before_the_place(
    sends: list[tuple[int, int, int]],
) -> None:
    """Each front sends the scores in pieces and the tokens, from a place up to that which the edge has, and dies."""
    stream, items = reader(), []
    for upto, scored_from, size in [*sends, (6, 0, 4)]:
        opening = stream.opening()
        assert isinstance(opening, messages.Read)
        at = min(scored_from, opening.scored)
        while at < len(SCORED.logprobs):
            piece = Scored(1 + at, SCORED.logprobs[at : at + size], SCORED.top[at : at + size])
            assert stream.push(messages.ScoredItem(stream=1, scored=piece))
            at += size
        for token in TOKENS[:upto]:
            assert stream.push(messages.TokenItem(stream=1, token=token))
        items += taken(stream)
    stream.push(messages.FinishedItem(stream=1, finished=Finished("length")))
    stream.fail(NoCapacity("too late"))
    items += taken(stream)
    scores = [item for item in items if isinstance(item, Scored)]
    assert tuple(value for item in scores for value in item.logprobs) == SCORED.logprobs
    assert tuple(value for item in scores for value in item.top) == SCORED.top
    assert [item for item in items if isinstance(item, Token)] == TOKENS
    assert items[-1:] == [Finished("length")]
    assert stream.ended


def test_a_gap_is_noticed() -> None:
    stream = reader()
    assert not stream.push(messages.TokenItem(stream=1, token=TOKENS[1]))
    assert not stream.push(messages.ScoredItem(stream=1, scored=Scored(3, (-1.0,), ((),))))
    assert taken(stream) == []


def test_an_error_is_raised_once_and_after_what_came_before_it() -> None:
    stream = reader()
    stream.push(messages.TokenItem(stream=1, token=TOKENS[0]))
    stream.fail(NoCapacity("nobody"))

    async def take() -> None:
        assert await stream.next() == TOKENS[0]
        with pytest.raises(NoCapacity):
            await stream.next()

    asyncio.run(take())


def test_what_is_left_of_scores_is_what_comes_after_the_known_ones() -> None:
    assert after_position(SCORED, 0) == SCORED
    assert after_position(SCORED, 3) == Scored(4, (-4.0,), ((),))
    assert after_position(SCORED, 4) is None
