"""Measures the time that msgspec, pydantic and json take for the bodies and events of 32 streams.

    python -m benchmarks.bodies

Each stream is a chat of 14 messages and an answer of 128 events. Bodies are decoded and validated by msgspec, by
msgspec with the rule about fields (as the server does it), and by pydantic; events are made and written by msgspec, by
pydantic, and as dictionaries by `json`. Figures are milliseconds for all streams, the best of seven rounds.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pydantic

from serving.api.http.bodies.chat import ChatBody
from serving.api.http.bodies.decoding import decode_body
from serving.api.http.openai_objects import ChatChunkChoice, ChatCompletionChunk, Delta

STREAMS, EVENTS, ROUNDS = 32, 128, 7
_HEAD: dict[str, Any] = {"id": "chatcmpl-0123456789", "object": "chat.completion.chunk", "created": 1, "model": "m"}
_END: dict[str, Any] = {"logprobs": None, "finish_reason": None}
BODY = json.dumps(
    {
        "model": "m",
        "messages": [{"role": "user", "content": "word " * 40}, {"role": "assistant", "content": "word " * 40}] * 7,
        "max_tokens": EVENTS,
        "temperature": 0.7,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
).encode()


class PydanticMessage(pydantic.BaseModel):
    role: str
    content: str | list[dict[str, Any]] | None = None


class PydanticBody(pydantic.BaseModel, extra="allow", strict=True):
    messages: list[PydanticMessage]
    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None


class PydanticDelta(pydantic.BaseModel):
    role: str | None = None
    content: str | None = None


class PydanticChoice(pydantic.BaseModel):
    index: int
    delta: PydanticDelta
    logprobs: dict[str, Any] | None
    finish_reason: str | None


class PydanticChunk(pydantic.BaseModel):
    id: str
    object: str
    created: int
    model: str
    choices: list[PydanticChoice]


def by_msgspec() -> bytes:
    """An event as the server writes it."""
    choice = ChatChunkChoice(index=0, delta=Delta(content=" token"), **_END)
    return msgspec.json.encode(ChatCompletionChunk(**_HEAD, choices=[choice]))


def by_pydantic() -> str:
    """The same event of pydantic's models."""
    choice = PydanticChoice(index=0, delta=PydanticDelta(content=" token"), **_END)
    return PydanticChunk(**_HEAD, choices=[choice]).model_dump_json(exclude_unset=True)


def by_json() -> bytes:
    """The same event of dictionaries."""
    event = _HEAD | {"choices": [{"index": 0, "delta": {"content": " token"}} | _END]}
    return json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()


def best_ms(run: Callable[[], object], times: int) -> float:
    """Milliseconds of `times` runs in the best round."""
    rounds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(times):
            run()
        rounds.append(1e3 * (time.perf_counter() - began))
    return round(min(rounds), 2)


def main() -> int:
    """Measure and print."""
    bodies: dict[str, Callable[[], object]] = {
        "msgspec": lambda: msgspec.json.decode(BODY, type=ChatBody),
        "msgspec and the rule": lambda: decode_body(msgspec.json.decode(BODY), ChatBody),
        "pydantic": lambda: PydanticBody.model_validate_json(BODY),
    }
    events: dict[str, Callable[[], object]] = {"msgspec": by_msgspec, "pydantic": by_pydantic, "json": by_json}
    for name, run in bodies.items():
        print(f"{STREAMS} bodies of {len(BODY)} bytes  {name}  {best_ms(run, STREAMS)} ms")
    for name, run in events.items():
        print(f"{STREAMS * EVENTS} events  {name}  {best_ms(run, STREAMS * EVENTS)} ms")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
