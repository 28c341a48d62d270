"""Streams over HTTP, as clients of OpenAI's API have them, recorded as `benchmarks.streams` records those over gRPC."""

import json
import time

import httpx

from benchmarks.streams import Ask, Trace


def http_client(address: str, streams: int) -> httpx.AsyncClient:
    """A client of the server at host:port with a connection for each of so many streams."""
    limits = httpx.Limits(max_connections=streams, max_keepalive_connections=streams)
    return httpx.AsyncClient(base_url=f"http://{address}", limits=limits, timeout=600.0)


async def play_http(client: httpx.AsyncClient, ask: Ask) -> Trace:
    """Send a request to /v1/completions and read its stream to the end. An error is recorded in the trace.

    Events say how many tokens there are so far, but not which: `tokens` has -1 for each.
    """
    trace = Trace(ask, time.monotonic())
    body = {
        "prompt": ask.prompt,
        "temperature": ask.temperature,
        "seed": ask.seed,
        "max_tokens": ask.max_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                trace.error = (await answer.aread()).decode()
            async for line in answer.aiter_lines():
                now = time.monotonic()
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    trace.error = event["error"]["message"]
                    break
                trace.prompt_tokens = event["usage"]["prompt_tokens"]
                new = event["usage"]["completion_tokens"] - len(trace.times)
                trace.times += [now] * new
                trace.tokens += [-1] * new
    except httpx.HTTPError as error:
        trace.error = f"{type(error).__name__}: {error}"
    finally:
        trace.begun.set()
    return trace
