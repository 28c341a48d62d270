"""Clients of a plain OpenAI server, each with one stream at a time, that write down what they receive and when."""

import asyncio
import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import openai

_AFTER_ERROR_S = 0.25
"""A client waits this long before its next request when one has failed."""


@dataclasses.dataclass
class Stream:
    """One request as its client saw it. Times are seconds of the monotonic clock, one for each piece of text."""

    client: int
    prompt: str
    sent: float
    text: str = ""
    times: list[float] = dataclasses.field(default_factory=list)
    tokens: int | None = None
    """As the server counted them, once the stream has ended."""
    finish_reason: str | None = None
    error: str | None = None
    ended: float | None = None
    """When it ended, well or not; None while it is open."""


@dataclasses.dataclass(frozen=True)
class Asking:
    """How requests are made: the model's name, tokens of an answer, and fields that the official API does not have."""

    model: str
    max_tokens: int
    extra_body: Mapping[str, Any]

    async def stream(self, api: openai.AsyncOpenAI, into: Stream) -> None:
        """Send the request of a stream, and read it to its end. What goes wrong is written into the stream."""
        try:
            answer = await api.completions.create(
                model=self.model,
                prompt=into.prompt,
                max_tokens=self.max_tokens,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=dict(self.extra_body),
            )
            async for part in answer:
                for choice in part.choices:
                    if choice.text:
                        into.text += choice.text
                        into.times.append(time.monotonic())
                    into.finish_reason = choice.finish_reason or into.finish_reason
                if part.usage is not None:
                    into.tokens = part.usage.completion_tokens
            if into.finish_reason not in ("stop", "length"):
                into.error = f"the stream ended with finish_reason {into.finish_reason}"
        except (openai.OpenAIError, httpx.HTTPError, ValueError) as error:  # ValueError: an event that is no JSON
            into.error = f"{type(error).__name__}: {error}"
        except asyncio.CancelledError:
            into.error = "the trial ended before the stream"
            raise
        finally:
            into.ended = time.monotonic()


def connect(url: str) -> openai.AsyncOpenAI:
    """The official client as everybody uses it: with its own retries of requests that have not begun."""
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=120.0)


async def undisturbed(url: str, asking: Asking, prompts: Sequence[str], clients: int) -> list[Stream]:
    """Each prompt's stream while nothing fails, so many at a time. Raises RuntimeError if one fails all the same."""
    turn = iter(prompts)
    streams: list[Stream] = []

    async def run(client: int, api: openai.AsyncOpenAI) -> None:
        for prompt in turn:
            streams.append(Stream(client, prompt, time.monotonic()))
            await asking.stream(api, streams[-1])

    async with connect(url) as api:
        await asyncio.gather(*(run(client, api) for client in range(clients)))
    for stream in streams:
        if stream.error is not None:
            raise RuntimeError(f"an undisturbed request failed: {stream.error}")
    return streams


class Crowd:
    """Clients that each send the next request when the last one has ended, well or not, until `stop`."""

    def __init__(self, url: str, asking: Asking, prompts: Sequence[str]) -> None:
        self._api = connect(url)
        self._asking = asking
        self._turn = itertools.cycle(prompts)
        self._going = True
        self._tasks: list[asyncio.Task[None]] = []
        self.streams: list[Stream] = []

    def start(self, clients: int) -> None:
        """Start so many clients."""
        self._tasks += [asyncio.create_task(self._run(client)) for client in range(clients)]

    def delivered(self, since: float) -> int:
        """The pieces of text that arrived since a time."""
        return sum(time >= since for stream in self.streams for time in stream.times)

    async def stop(self, grace_s: float) -> list[Stream]:
        """Send nothing more, wait at most so many seconds for what runs, and return all streams."""
        self._going = False
        _, stuck = await asyncio.wait(self._tasks, timeout=grace_s)
        for task in stuck:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._api.close()
        return self.streams

    async def _run(self, client: int) -> None:
        while self._going:
            stream = Stream(client, next(self._turn), time.monotonic())
            self.streams.append(stream)
            await self._asking.stream(self._api, stream)
            if stream.error is not None:
                await asyncio.sleep(_AFTER_ERROR_S)
