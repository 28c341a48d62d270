"""The front's end of the stream to a host agent that passes on what the ranks of its host send and get.

Orders of one moment are one message, and an order to several ranks is in it once.
"""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from serving.executor.host_steps import HostAnswer
from serving.executor.rank_errors import CommandFailed
from serving.proto.moejax.v1 import link_pb2

ALONE = frozenset({"write_weights", "write_cache", "restore_cache"})
"""Commands with much data: each is a message of its own."""


class HostStepWait:
    """The answers to one step that are missing from the ranks of one host. `future` gets the answers once all are
    there. A rank that failed fails it at once; one whose values are not finite, when the others have answered too."""

    def __init__(self, ranks: Iterable[int]) -> None:
        self.future: asyncio.Future[list[HostAnswer]] = asyncio.get_running_loop().create_future()
        self.non_finite: dict[int, tuple[int, ...]] = {}
        self._missing = set(ranks)
        self._answers: list[HostAnswer] = []
        self._error: CommandFailed | None = None

    def take(self, answer: HostAnswer) -> None:
        """Take the answers of some of the ranks."""
        self._answers.append(answer)
        self._missing.difference_update(answer.ranks)
        self._end()

    def fail(self, error: CommandFailed) -> None:
        """Take the failure of one of the ranks."""
        self._missing.discard(error.rank)
        self._error = self._error or error
        if error.non_finite_rows:
            self.non_finite[error.rank] = error.non_finite_rows
        elif not self.future.done():
            self.future.set_exception(error)
        self._end()

    def _end(self) -> None:
        if self._missing or self.future.done():
            return
        if self._error is not None:
            self.future.set_exception(self._error)
        else:
            self.future.set_result(self._answers)


@dataclasses.dataclass(frozen=True)
class _Repeated:
    """The command that was queued last, and what it was made of."""

    content: Any
    item: link_pb2.HostCommand


class HostStream:
    """The stream of one host agent; `host` names it in messages."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.pending_steps: dict[int, HostStepWait] = {}
        """The steps that its ranks have not answered, in order."""
        self._queue: list[link_pb2.HostCommand] = []
        self._queued = asyncio.Event()
        self._ended = False
        self._last: _Repeated | None = None

    @property
    def unsent(self) -> bool:
        """Whether anything waits to be sent."""
        return bool(self._queue)

    def send(self, link: int, what: str, message: Any, number: int) -> None:
        """Send a command to a rank. The same message to several ranks, one after the other, is sent once."""
        last = self._last
        if last is None or last.content is not message or link in last.item.links:
            item = link_pb2.HostCommand(command=link_pb2.Command(**{what: message}))
            last = self._last = _Repeated(message, item)
            self._append(item)
            self._last = last
        last.item.links.append(link)
        last.item.ids.append(number)

    def send_step(self, step: link_pb2.HostStep, links: Sequence[int]) -> None:
        """Send a step to these ranks."""
        self._append(link_pb2.HostCommand(links=links, step=step))

    def fail_step(self, step: int, error: CommandFailed) -> None:
        """One of its ranks has failed a step."""
        if (waiting := self.pending_steps.get(step)) is not None:
            waiting.fail(error)

    def accept(self, link: int) -> None:
        """Let a rank in."""
        self._append(link_pb2.HostCommand(links=[link], accepted=True))

    def close_rank(self, link: int, why: str = "") -> None:
        """End the stream of a rank; with a reason, it is refused."""
        self._append(link_pb2.HostCommand(links=[link], closed=why))

    def end(self) -> None:
        """End the stream."""
        self._ended = True
        self._queued.set()

    async def messages(self) -> AsyncIterator[link_pb2.HostCommands]:
        """The messages to send, until the end."""
        while True:
            await self._queued.wait()
            self._queued.clear()
            self._last, queue, self._queue = None, self._queue, []
            for items in _messages(queue):
                yield link_pb2.HostCommands(items=items)
            if self._ended:
                return

    def _append(self, item: link_pb2.HostCommand) -> None:
        self._last = None
        self._queue.append(item)
        self._queued.set()


def _messages(queue: list[link_pb2.HostCommand]) -> Iterable[list[link_pb2.HostCommand]]:
    """The queue in as few messages as may be: commands with much data are alone in theirs."""
    together: list[link_pb2.HostCommand] = []
    for item in queue:
        if item.WhichOneof("what") == "command" and item.command.WhichOneof("what") in ALONE:
            if together:
                yield together
                together = []
            yield [item]
        else:
            together.append(item)
    if together:
        yield together
