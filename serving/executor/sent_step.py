"""A step that was sent to ranks, with streams of their own or through their host agents, and its answers."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from serving.executor.host_steps import HostAnswer, StepAnswers
from serving.executor.host_stream import HostStepWait, HostStream
from serving.executor.incarnation import Incarnation
from serving.executor.rank_errors import CommandFailed
from serving.proto.moejax.v1 import link_pb2
from serving.protocol import clock


class SentStep:
    """One step on `parts`, by rank, and on `hosts`, by host stream. `alive` returns a rank, or raises RankLost; nothing
    is sent then. All `known` ranks that are not in the step are not in the plan either."""

    def __init__(
        self,
        alive: Callable[[int], Incarnation],
        known: Mapping[int, Incarnation],
        parts: Mapping[int, link_pb2.Step],
        hosts: Mapping[HostStream, tuple[list[int], link_pb2.HostStep]],
    ) -> None:
        now = clock.now()
        own = [alive(rank) for rank in parts]
        by_host = {stream: [alive(rank) for rank in ranks] for stream, (ranks, _) in hosts.items()}
        messages = [*parts.values(), *(message for _, message in hosts.values())]
        self._step, self.epoch = messages[-1].step, messages[-1].epoch
        self._ranks = [*own, *(each for ranks in by_host.values() for each in ranks)]
        self._own: dict[int, asyncio.Future[link_pb2.StepDone]] = {}
        self._hosts: dict[HostStream, HostStepWait] = {}
        for each in known.values():
            each.in_plan = False
        for each, part in zip(own, parts.values(), strict=True):
            future = self._own[each.rank] = asyncio.get_running_loop().create_future()
            self._expect(each, future, now)
            each.send("step", part)
        for stream, (numbers, message) in hosts.items():
            waiting = self._hosts[stream] = stream.pending_steps[self._step] = HostStepWait(numbers)
            for each in by_host[stream]:
                self._expect(each, waiting.future, now)
            stream.send_step(message, [each.link for each in by_host[stream]])

    async def answers(self) -> StepAnswers:
        """Wait for all answers. Raises RankLost or CommandFailed at the first rank that gives none."""
        found = await asyncio.gather(*self._own.values(), *(waiting.future for waiting in self._hosts.values()))
        own, hosts = found[: len(self._own)], found[len(self._own) :]
        answers: list[HostAnswer] = [answer for host in hosts for answer in host]
        return StepAnswers(dict(zip(self._own, own, strict=True)), tuple(answers))

    async def non_finite_rows(self, wait_s: float) -> dict[int, tuple[int, ...]]:
        """By rank, the rows whose values were not finite. The ranks have `wait_s` seconds to end the step."""
        futures: list[asyncio.Future[Any]] = [*self._own.values(), *(each.future for each in self._hosts.values())]
        await asyncio.wait(futures, timeout=wait_s)
        errors = [f.exception() for f in futures if f.done() and not f.cancelled()]
        rows = {e.rank: e.non_finite_rows for e in errors if isinstance(e, CommandFailed) and e.non_finite_rows}
        for waiting in self._hosts.values():
            rows |= waiting.non_finite
        return rows

    def forget(self) -> None:
        """Wait for its answers no more."""
        for stream in self._hosts:
            stream.pending_steps.pop(self._step, None)
        futures = [*self._own.values(), *(waiting.future for waiting in self._hosts.values())]
        if all(future.done() and not future.cancelled() and future.exception() is None for future in futures):
            return  # each rank that has answered waits for this step no more
        for future in futures:
            future.cancel()
        for each in self._ranks:
            each.pending_steps.pop(self._step, None)
            each.step_sent_at = each.step_sent_at if each.pending_steps else None

    def _expect(self, each: Incarnation, future: "asyncio.Future[Any]", now: float) -> None:
        each.in_plan = True
        each.pending_steps[self._step] = future
        each.step_sent_at = each.step_sent_at or now
