"""An event loop whose time is virtual: where asyncio would wait for the next timer, the clock moves to it instead.

Nothing outside the loop can wake it, so that a run depends on nothing but what is scheduled in it.
"""

import asyncio
import collections
import contextvars
import heapq
from collections.abc import Callable
from typing import Any

TURN_S = 2e-5
"""Virtual seconds that one turn of the loop takes, so that code which polls without waiting does not stop the clock."""
OWNER: contextvars.ContextVar[object] = contextvars.ContextVar("owner", default=None)
"""The simulated process that the running code belongs to; tasks inherit it."""


class Deadlock(Exception):
    """Nothing is scheduled any more, and the main coroutine waits."""


class OutOfTime(Exception):
    """A run has taken more turns of the loop than it may."""


class _Callback:
    """A callback, as `asyncio.Handle` is one, with what is needed here alone: it looks for no debugger, and keeps no
    trace of where it was made."""

    __slots__ = ("_at", "_dropped", "args", "callback", "context")

    def __init__(
        self, callback: Callable[..., Any], args: tuple[Any, ...], context: contextvars.Context | None, at: float
    ) -> None:
        self.callback: Callable[..., Any] | None = callback
        self.args = args
        self.context = contextvars.copy_context() if context is None else context
        self._at = at
        self._dropped = False

    def cancel(self) -> None:
        """See `asyncio.Handle.cancel`."""
        self.callback, self.args, self._dropped = None, (), True

    def cancelled(self) -> bool:
        """See `asyncio.Handle.cancelled`."""
        return self._dropped

    def when(self) -> float:
        """See `asyncio.TimerHandle.when`."""
        return self._at


class VirtualTimeLoop(asyncio.BaseEventLoop):
    """An event loop under virtual time, for at most `max_turns` turns. `thread_delay` gives the virtual seconds before
    a function that asyncio would run in a thread is run (here), and before its result arrives.

    A turn is that of asyncio without what nothing needs here, a selector and the search for slow callbacks: it runs
    all that was ready when it began, and the timers that are due, in order of their times; those of one time in the
    order in which they were set.
    """

    def __init__(self, *, max_turns: int, thread_delay: Callable[[], float] = lambda: 0.0) -> None:
        super().__init__()
        self._now = 0.0
        self._max_turns = max_turns
        self._thread_delay = thread_delay
        self._tasks: list[tuple[object, asyncio.Task[Any]]] = []
        self._turn: collections.deque[_Callback] = collections.deque()
        """The callbacks that are ready to run."""
        self._timers: list[tuple[float, int, _Callback]] = []
        """A heap: the time, the number and the handle of each timer."""
        self._timers_set = 0
        self.turns = 0
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        """Virtual seconds since the start."""
        return self._now

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> _Callback:
        """Call a function in the next turn."""
        handle = _Callback(callback, args, context, self._now)
        self._turn.append(handle)
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> _Callback:
        """Call a function after some seconds."""
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> _Callback:
        """Call a function at a time."""
        handle = _Callback(callback, args, context, when)
        self._timers_set += 1
        heapq.heappush(self._timers, (when, self._timers_set, handle))
        return handle

    def _run_once(self) -> None:
        """One turn. Raises Deadlock and OutOfTime."""
        self.turns += 1
        if self.turns > self._max_turns:
            raise OutOfTime(f"{self.turns} turns of the event loop")
        turn, timers = self._turn, self._timers
        while timers and timers[0][2].callback is None:
            heapq.heappop(timers)
        self._now += TURN_S
        if not turn and not self._stopping:  # type: ignore[attr-defined]
            if not timers:
                raise Deadlock("nothing is scheduled, and nothing can happen any more")
            self._now = max(self._now, timers[0][0])
        now = self._now
        while timers and timers[0][0] <= now:
            turn.append(heapq.heappop(timers)[2])
        for _ in range(len(turn)):
            handle = turn.popleft()
            callback = handle.callback
            if callback is not None:
                try:
                    handle.context.run(callback, *handle.args)
                except Exception as error:
                    self.call_exception_handler({"message": f"Exception in {callback!r}", "exception": error})

    def close(self) -> None:
        """Drop all that is scheduled."""
        self._turn.clear()
        self._timers.clear()
        super().close()

    def _write_to_self(self) -> None:
        """Nothing but the loop itself schedules anything."""

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> "asyncio.Future[Any]":  # type: ignore[override]
        """Run a function a little later in this thread; its result arrives a little later still."""
        future: asyncio.Future[Any] = self.create_future()

        def run() -> None:
            if future.cancelled():
                return
            try:
                result, error = func(*args), None
            except Exception as raised:
                result, error = None, raised
            self.call_later(self._thread_delay(), finish, result, error)

        def finish(result: Any, error: Exception | None) -> None:
            if future.cancelled():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        self.call_later(self._thread_delay(), run)
        return future

    def tasks_of(self, owner: object) -> list[asyncio.Task[Any]]:
        """The tasks of a simulated process that are not done."""
        return [task for own, task in self._tasks if own is owner and not task.done()]

    def unseen_errors(self) -> list[tuple[object, asyncio.Task[Any], BaseException]]:
        """The tasks that ended with an error which nobody has looked at: owner, task and error of each."""
        found = []
        for owner, task in self._tasks:
            if task.done() and not task.cancelled() and getattr(task, "_log_traceback", False):
                error = task.exception()
                if error is not None:
                    found.append((owner, task, error))
        return found

    def _make_task(self, loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> "asyncio.Task[Any]":
        context = options.get("context")
        task = asyncio.Task(coro, loop=self, **options)
        self._tasks.append((OWNER.get() if context is None else context.get(OWNER), task))
        if len(self._tasks) % 4096 == 0:
            self._tasks = [
                each for each in self._tasks if not each[1].done() or getattr(each[1], "_log_traceback", False)
            ]
        return task


def is_item_of_stream(task: "asyncio.Task[Any]") -> bool:
    """Whether a task is the next item of an asynchronous generator, made by `ensure_future(anext(...))`: `merged` keeps
    such a task, with its item or its error, until the reader of the merged stream comes to it."""
    return type(task.get_coro()).__name__ == "async_generator_asend"


def context_of(owner: object) -> contextvars.Context:
    """A context in which tasks and callbacks belong to `owner`."""
    context = contextvars.Context()
    context.run(OWNER.set, owner)
    return context
