"""Steps with which every rank is late: one rank may be stuck and hold up the others, whose heartbeats all go on."""

import asyncio
from collections.abc import Callable, Collection

from serving.executor.failure_detector import Cause
from serving.executor.incarnation import Incarnation
from serving.executor.rank_errors import CommandFailed, RankLost
from serving.proto.moejax.v1 import link_pb2

ABORTED_S = 1.0
"""Seconds that a rank has to answer a step whose exchange was aborted because all ranks were late with it."""


class LateSteps:
    """The steps that these ranks have not answered. They are taken from the ranks: an answer that still comes counts as
    a sign of life alone."""

    def __init__(self, ranks: Collection[Incarnation]) -> None:
        self._steps: list[tuple[Incarnation, dict[int, asyncio.Future[link_pb2.StepDone]]]] = []
        for each in ranks:
            self._steps.append((each, dict(each.pending_steps)))
            each.pending_steps.clear()
            each.step_sent_at = None

    async def judge(self, aborted_at: float, declare: Callable[[int, Cause, float], None]) -> None:
        """The exchange of the steps was aborted: a rank that is not stuck answers. Declare the others dead, and fail
        the steps. When all answer, or none does, nobody is declared dead: a new generation is formed, which a rank that
        is stuck does not join."""
        await asyncio.sleep(ABORTED_S)
        silent = [each for each, _ in self._steps if each.loss is None and each.answered_at < aborted_at]
        if len(silent) < len(self._steps):
            for each in silent:
                why = f"no answer within {ABORTED_S:g} s after its exchange was aborted, and others answered"
                declare(each.rank, Cause("step", why), each.answered_at)
        for each, futures in sorted(self._steps, key=lambda item: item[0].loss is None):  # a loss explains the others
            for waiting in futures.values():
                if not waiting.done():
                    waiting.set_exception(
                        RankLost(each.rank, str(each.loss.cause))
                        if each.loss is not None
                        else CommandFailed(each.rank, "step", "every rank is late with it")
                    )
