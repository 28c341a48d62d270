"""Streams that run while ranks die, and the tokens they must have."""

import concurrent.futures
import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

from serving.api.client import Client
from serving.errors import DeadlineExceeded, Unreachable
from serving.protocol.events import Event
from serving.protocol.status import Status


@dataclasses.dataclass
class Stream:
    """One request and what came of it."""

    prompt: list[int]
    temperature: float
    seed: int
    max_tokens: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    indices: list[int] = dataclasses.field(default_factory=list)
    epochs: list[int] = dataclasses.field(default_factory=list)
    error: Exception | None = None

    def run(self, client: Client) -> None:
        """Read the stream to its end."""
        try:
            for chunk in client.stream(
                self.prompt,
                temperature=self.temperature,
                seed=self.seed,
                max_tokens=self.max_tokens,
                ignore_eos=True,
            ):
                self.indices += range(chunk.index, chunk.index + len(chunk.token_ids))
                self.tokens += chunk.token_ids
                self.epochs.append(chunk.epoch)
        except Exception as error:
            self.error = error

    def again(self) -> "Stream":
        """The same request, not yet sent."""
        return Stream(self.prompt, self.temperature, self.seed, self.max_tokens)


@dataclasses.dataclass
class Traffic:
    """Requests whose answers are known."""

    known: list[Stream]

    @classmethod
    def record(cls, client: Client, *, streams: int, prompt_tokens: int, max_tokens: int, alone: bool = False) -> Self:
        """Ask all at once, greedy and seeded in turn; or each `alone`, which takes as many times the steps."""
        known = [
            Stream([(7 * i + 3 * j) % 500 + 5 for j in range(prompt_tokens)], float(i % 2), i, max_tokens)
            for i in range(streams)
        ]
        with concurrent.futures.ThreadPoolExecutor(1 if alone else streams) as pool:
            list(pool.map(lambda stream: stream.run(client), known))
        for stream in known:
            assert stream.error is None
            assert len(stream.tokens) == max_tokens
        return cls(known)

    def during(self, client: Client, *acts: Callable[[], None], after: float = 0.3) -> list[Stream]:
        """All streams at once; `acts` one after the other once `after` of their tokens are there, while some are still
        open. Checks them all."""
        wanted = after * sum(stream.max_tokens for stream in self.known)
        while True:
            streams = [stream.again() for stream in self.known]
            threads = [threading.Thread(target=stream.run, args=(client,)) for stream in streams]
            for thread in threads:
                thread.start()
            while sum(len(s.tokens) for s in streams) < wanted and any(t.is_alive() for t in threads):
                time.sleep(0.002)
            if not acts or any(thread.is_alive() for thread in threads):
                break
            self._check(streams, threads)  # they were over before this thread had its turn: once more
        for act in acts:
            act()
        self._check(streams, threads)
        return streams

    def _check(self, streams: list[Stream], threads: list[threading.Thread]) -> None:
        """Wait for the streams to end, and compare them with what is known."""
        for thread in threads:
            thread.join(300)
            assert not thread.is_alive(), "a stream does not end"
        for stream, known in zip(streams, self.known, strict=True):
            assert stream.error is None, stream.error
            assert stream.indices == list(range(known.max_tokens))
            assert stream.tokens == known.tokens


def pid_of(status: Status, rank: int) -> int:
    """The process of a rank."""
    pid = status.ranks[rank].pid
    assert pid is not None, f"rank {rank} is {status.ranks[rank].state}"
    return pid


def kill(client: Client, rank: int, how: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    """An act: the signal to the rank's process, straight from the kernel."""
    pid = pid_of(client.status(), rank)
    return lambda: os.kill(pid, how)


def wait_until(holds: Callable[[], bool], what: str, limit_s: float = 120.0, *, pause_s: float = 0.02) -> None:
    """Poll until `holds`, every `pause_s` seconds."""
    end = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end, f"not within {limit_s:.0f} s: {what}"
        time.sleep(pause_s)


def wait_until_whole(client: Client) -> None:
    """All ranks serve, and every single loss is prepared. After a front that was killed nobody answers for a while."""

    def whole() -> bool:
        try:
            status = client.status()
        except Unreachable:
            return False
        serving = all(rank.state == "serving" for rank in status.ranks)
        return serving and status.lattice.get("1 rank", 1.0) == 1.0

    wait_until(whole, "all ranks serve again", pause_s=0.1)  # it takes seconds, and a status is work of the front's


def events_since(client: Client, sequence: int) -> Iterator[Event]:
    """Past events above a sequence, and those of the next half second. Every server has reported at least one event, so
    that a call in which none comes was only too slow."""
    came, timeout_s = False, 0.5
    while not came:
        with contextlib.suppress(DeadlineExceeded):
            for event in client.watch(0, timeout_s=timeout_s):
                came = True
                if event.sequence > sequence:
                    yield event
        timeout_s *= 2


def last_event(client: Client) -> int:
    """The sequence of the newest event."""
    return max((event.sequence for event in events_since(client, 0)), default=0)
