"""Streams of llama.cpp's own /completion, which says how many tokens each event has."""

import json
import time

import httpx

from benchmarks.streams import Ask, Trace


async def play_llama(client: httpx.AsyncClient, ask: Ask) -> Trace:
    """Send a request and read its stream to the end, each on a connection of its own, as the server closes idle
    ones."""
    trace = Trace(ask, time.monotonic())
    body = {
        "prompt": ask.prompt,
        "temperature": ask.temperature,
        "n_predict": ask.max_tokens,
        "ignore_eos": True,
        "cache_prompt": False,
        "stream": True,
    }
    async with client.stream("POST", "/completion", json=body, headers={"Connection": "close"}) as answer:
        if answer.status_code != 200:
            trace.error = (await answer.aread()).decode()
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or trace.error is not None:
                continue
            now, event = time.monotonic(), json.loads(line.removeprefix("data: "))
            if "error" in event:
                trace.error = event["error"]["message"]
                continue
            new = event["tokens_predicted"] - len(trace.times)
            trace.times += [now] * new
            trace.tokens += [-1] * new
    if trace.error is None and len(trace.tokens) != ask.max_tokens:
        trace.error = f"{len(trace.tokens)} tokens of {ask.max_tokens}"
    return trace
