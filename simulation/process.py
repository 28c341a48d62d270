"""A simulated process as the kernel has it: it runs, is stopped, waits for a processor, or has ended."""

import asyncio
import contextvars
from collections.abc import Callable


class Process:
    """A process that can be stopped and killed between any two of its callbacks, which are made with `later`."""

    def __init__(self) -> None:
        self.alive = True
        self.doomed_at: float | None = None
        """When it was sent SIGKILL."""
        self.stopped = False
        self.starved_since: float | None = None
        """Since when it waits for a processor; None while it has one."""
        self._starved_until = self._starved_s = 0.0
        self._context = contextvars.Context()
        self._deferred: list[Callable[[], None]] = []

    @property
    def doomed(self) -> bool:
        """It was sent SIGKILL."""
        return self.doomed_at is not None

    def doom(self) -> None:
        """It is sent SIGKILL."""
        if self.doomed_at is None:
            self.doomed_at = asyncio.get_running_loop().time()

    @property
    def state(self) -> str:
        """The kernel's letter for the process."""
        if not self.alive:
            return "X"
        return "T" if self.stopped else "S" if self.starved_since is None else "R"

    @property
    def held(self) -> bool:
        """It runs nothing: it is stopped, or waits for a processor."""
        return self.stopped or self.starved_since is not None

    def run_delay_s(self) -> float:
        """Seconds for which it has waited for a processor since its start."""
        now = asyncio.get_running_loop().time()
        return self._starved_s + (0.0 if self.starved_since is None else now - self.starved_since)

    def starve(self, seconds: float) -> None:
        """Its process gets no processor for a while."""
        loop = asyncio.get_running_loop()
        if self.starved_since is None:
            self.starved_since = loop.time()
        self._starved_until = max(self._starved_until, loop.time() + seconds)
        loop.call_later(seconds, lambda: loop.time() < self._starved_until or self.feed())

    def feed(self) -> None:
        """Its process gets a processor."""
        self._starved_s, self.starved_since = self.run_delay_s(), None
        self._resume()

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        """Do something in a while, if this process runs then; once it goes on, if it is held then."""

        def due() -> None:
            if not self.alive:
                return
            if self.held:
                self._deferred.append(act)
            else:
                act()

        asyncio.get_running_loop().call_later(seconds, due, context=self._context)

    def signal(self, name: str) -> None:
        """A signal arrives."""
        if name == "SIGSTOP":
            self.stopped = True
        elif name == "SIGCONT" and self.stopped:
            self.stopped = False
            self._resume()
        elif name == "SIGKILL":
            self.die("signal 9")

    def _resume(self) -> None:
        deferred, self._deferred = self._deferred, []
        for act in deferred:
            self.later(0.0, act)

    def die(self, how: str) -> None:
        """The process ends."""
        raise NotImplementedError
