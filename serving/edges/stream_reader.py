"""One stream that an edge reads from the front: what has come of it, and how it is asked for again."""

import asyncio

import msgspec

from serving.edges import messages
from serving.errors import MoejaxError
from serving.protocol.events import Event
from serving.protocol.request import Finished, Scored, Token

Item = Scored | Token | Finished | Event


class StreamReader:
    """The items of a stream in their order, each once, from however many fronts. What its reader has not taken waits
    here: at most one answer."""

    def __init__(
        self, opening: messages.Read | messages.Replay | messages.Watch, deadline: float | None = None
    ) -> None:
        self.stream = opening.stream
        self.deadline = deadline
        """That of the request, on this machine's clock, where the edge knows it."""
        self.ended = False
        """True once the last item, or an error, has come."""
        self.request_id = None if isinstance(opening, messages.Watch) else opening.request_id
        self._opening = opening
        self._tokens = 0
        self._scored = 0
        self._weights_version = ""
        """The weights of the first token that has come."""
        self._queue: asyncio.Queue[Item | MoejaxError | None] = asyncio.Queue()

    @property
    def begun(self) -> bool:
        """Whether a part of an answer has come."""
        return bool(self._tokens or self._scored)

    def opening(self) -> messages.EdgeMessage:
        """The message that asks the next front for the rest."""
        if isinstance(self._opening, messages.Watch):
            return self._opening
        opening = msgspec.structs.replace(self._opening, tokens=self._tokens, scored=self._scored)
        if isinstance(opening, messages.Read):
            opening.weights_version = self._weights_version
        return opening

    def begin_events(self) -> None:
        """A stream of events goes on with the first event of another server, which counts its own."""
        if isinstance(self._opening, messages.Watch):
            self._opening = messages.Watch(stream=self.stream, after=0)

    def push(
        self, message: messages.TokenItem | messages.ScoredItem | messages.FinishedItem | messages.EventItem
    ) -> bool:
        """Add an item; one that has come before is dropped. Returns False when items before it are missing."""
        match message:
            case messages.TokenItem():
                return self._push_token(message.token)
            case messages.ScoredItem():
                return self._push_scored(message.scored)
            case messages.FinishedItem():
                self._put_last(message.finished)
            case messages.EventItem():
                event = messages.event_of(message.event)
                self._opening = messages.Watch(stream=self.stream, after=event.sequence)
                self._queue.put_nowait(event)
        return True

    def end(self) -> None:
        """There are no more items."""
        self._put_last(None)

    def fail(self, error: MoejaxError) -> None:
        """The stream ends with an error."""
        self._put_last(error)

    async def next(self) -> Item | None:
        """The next item, None after the last one. Raises MoejaxError."""
        item = await self._queue.get()
        if isinstance(item, MoejaxError):
            raise item.with_traceback(None)  # one error ends many streams, and keeps the frames of none
        return item

    def _push_token(self, token: Token) -> bool:
        if token.index == self._tokens:
            self._tokens += 1
            self._weights_version = self._weights_version or token.weights_version
            self._queue.put_nowait(token)
        return token.index < self._tokens

    def _push_scored(self, scored: Scored) -> bool:
        rest = after_position(scored, self._scored)
        if rest is not None and rest.position == self._scored + 1:
            self._scored += len(rest.logprobs)
            self._queue.put_nowait(rest)
        return scored.position <= self._scored + 1

    def _put_last(self, item: Finished | MoejaxError | None) -> None:
        if not self.ended:
            self.ended = True
            self._queue.put_nowait(item)


def after_position(scored: Scored, known: int) -> Scored | None:
    """The part of `scored` after the first `known` prompt tokens; None when nothing is left."""
    skip = max(known + 1 - scored.position, 0)
    if skip >= len(scored.logprobs):
        return None
    return Scored(scored.position + skip, scored.logprobs[skip:], scored.top[skip:])
