"""The event loop under virtual time."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from simulation.virtual_time import Deadlock, OutOfTime, VirtualTimeLoop, context_of, is_item_of_stream


def run(main, **options) -> float:
    loop = VirtualTimeLoop(max_turns=10_000, **options)
    try:
        loop.run_until_complete(main())
        return loop.time()
    finally:
        loop.close()


def test_timers_are_due_in_order_and_cost_no_time() -> None:
    ended = []

    async def sleep(seconds: float) -> None:
        await asyncio.sleep(seconds)
        ended.append(seconds)

    async def main() -> None:
        await asyncio.gather(*map(sleep, (3600.0, 1.0, 86400.0 * 30)))

    assert run(main) >= 86400.0 * 30
    assert ended == [1.0, 3600.0, 86400.0 * 30]


def test_who_polls_without_waiting_does_not_stop_the_clock() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        while loop.time() < 0.01:
            await asyncio.sleep(0)

    run(main)


def test_a_wait_that_nothing_can_end_is_a_deadlock() -> None:
    async def main() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Deadlock):
        run(main)


def test_a_run_that_goes_round_in_circles_ends() -> None:
    async def main() -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(OutOfTime):
        run(main)


def test_threads_run_in_the_loop_a_little_later() -> None:
    async def main() -> None:
        began = asyncio.get_running_loop().time()
        assert await asyncio.to_thread(lambda x: x + 1, 1) == 2
        assert asyncio.get_running_loop().time() >= began + 2.0
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 / 0)

    run(main, thread_delay=lambda: 1.0)


def test_the_tasks_of_a_process_are_known_and_so_are_errors_that_nobody_saw() -> None:
    owner = object()

    async def fail() -> None:
        raise ValueError("nobody sees this")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)

        async def begin() -> None:
            asyncio.create_task(fail())  # noqa: RUF006
            asyncio.create_task(asyncio.sleep(1000))  # noqa: RUF006
            await asyncio.sleep(1)

        await loop.create_task(begin(), context=context_of(owner))
        assert len(loop.tasks_of(owner)) == 1
        assert loop.tasks_of(None) == [asyncio.current_task()]
        ((its, task, error),) = loop.unseen_errors()
        assert its is owner
        assert "nobody" in str(error)
        assert not is_item_of_stream(task)

    run(main)


def test_the_next_item_of_a_stream_is_known() -> None:
    async def items() -> AsyncGenerator[int, None]:
        yield 1

    async def main() -> None:
        task = asyncio.ensure_future(anext(items()))
        assert is_item_of_stream(task)
        assert await task == 1

    run(main)
