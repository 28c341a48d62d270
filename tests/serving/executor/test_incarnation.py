"""Which command a rank's main thread is judged by, and since when."""

import asyncio

import pytest

from serving.executor.incarnation import Incarnation, PendingCommand

pytestmark = pytest.mark.anyio


def rank_with(*commands: tuple[str, float], answered_at: float = 5.0) -> Incarnation:
    """A rank that was sent these commands, each at its time, and answered the last one before them."""
    each = Incarnation(0)
    each.answered_at = answered_at
    for number, (what, sent_at) in enumerate(commands):
        each.pending_commands[number] = PendingCommand(what, sent_at, asyncio.get_running_loop().create_future())
    return each


async def test_a_rank_is_judged_by_its_first_command_since_it_could_begin_with_it() -> None:
    assert rank_with().command_since is None
    assert rank_with(("adopt", 7.0), ("hold", 8.0)).command_since == 7.0
    assert rank_with(("adopt", 3.0)).command_since == 5.0


async def test_what_runs_beside_the_main_thread_or_has_a_limit_of_its_caller_is_not_judged() -> None:
    assert rank_with(("prepare", 6.0), ("stage_weights", 6.5)).command_since is None
    assert rank_with(("stage_weights", 6.0), ("adopt", 7.0)).command_since == 7.0
    assert rank_with(("join", 6.0), ("adopt", 7.0)).command_since is None


async def test_a_step_has_a_limit_of_its_own() -> None:
    each = rank_with(("adopt", 7.0))
    each.pending_steps[1] = asyncio.get_running_loop().create_future()
    assert each.command_since is None
