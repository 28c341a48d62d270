"""Chunks of a stream as the JSON of OpenAI's completions and chat completions."""

from collections.abc import Sequence
from typing import Any

from serving.calls import Call
from serving.generation import Chunk, Complete
from serving.tokens import Tokenizer


class Answer:
    """The JSON of one answer: `begin`, `chunk` and `end` for a stream, `whole` for all of it."""

    def __init__(self, call: Call, request_id: str, model: str, tokenizer: Tokenizer, created: int) -> None:
        self._call = call
        self._tokenizer = tokenizer
        self._offset = 0
        suffix = ".chunk" if call.stream and call.chat else ""
        self._head = {
            "id": request_id,
            "object": ("chat.completion" if call.chat else "text_completion") + suffix,
            "created": created,
            "model": model,
        }

    def begin(self) -> dict[str, Any] | None:
        """What a chat stream says before any text."""
        if not self._call.chat:
            return None
        return self._part({"delta": {"role": "assistant", "content": ""}}, None, None)

    def chunk(self, item: Chunk) -> dict[str, Any] | None:
        """A part of a stream; None when there is nothing to show for these tokens yet."""
        if not item.text and not (self._call.logprobs and item.token_ids):
            return None
        text = {"delta": {"content": item.text}} if self._call.chat else {"text": item.text}
        return self._part(text, self._logprobs([item]), None)

    def end(self, complete: Complete) -> list[dict[str, Any]]:
        """The last parts of a stream: the finish reason and, where asked for, the usage."""
        text: dict[str, Any] = {"delta": {}} if self._call.chat else {"text": ""}
        parts = [self._part(text, None, complete.reason)]
        if self._call.include_usage:
            parts.append(self._head | {"choices": [], "usage": _usage(complete)})
        return parts

    def whole(self, items: Sequence[Chunk], complete: Complete) -> dict[str, Any]:
        """The answer in one piece."""
        text = "".join(i.text for i in items)
        choice: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text}} if self._call.chat else {"text": text}
        )
        return self._part(choice, self._logprobs(items), complete.reason) | {"usage": _usage(complete)}

    def _part(self, choice: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        rest = {"index": 0, "logprobs": logprobs, "finish_reason": reason}
        part = self._head | {"choices": [choice | rest]}
        return part | {"usage": None} if self._call.include_usage else part

    def _logprobs(self, items: Sequence[Chunk]) -> dict[str, Any] | None:
        if not self._call.logprobs:
            return None
        pairs = [(t, p) for i in items for t, p in zip(i.token_ids, i.logprobs, strict=True)]
        texts = [self._tokenizer.decode([t]) for t, _ in pairs]
        values = [max(p, -9999.0) for _, p in pairs]  # JSON has no infinity
        if self._call.chat:
            entries = zip(texts, values, strict=True)
            return {"content": [{"token": t, "logprob": p, "bytes": _bytes(t), "top_logprobs": []} for t, p in entries]}
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": None, "text_offset": offsets}


def _bytes(text: str) -> list[int] | None:
    """The bytes of a token; None for part of a character, whose bytes its text does not show."""
    return None if "\ufffd" in text else list(text.encode())


def _usage(complete: Complete) -> dict[str, int]:
    return {
        "prompt_tokens": complete.prompt_tokens,
        "completion_tokens": complete.completion_tokens,
        "total_tokens": complete.prompt_tokens + complete.completion_tokens,
    }
