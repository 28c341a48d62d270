"""Items of a stream of answers as the JSON of OpenAI's completions and chat completions."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from serving.calls import Call
from serving.generation import Chunk, Complete, Item, PromptScores
from serving.request import Request, Top
from serving.tokens import Tokenizer
from serving.tools import ToolCall, ToolCalls

_LEAST = -9999.0
"""In place of minus infinity, which JSON has not."""


@dataclasses.dataclass(frozen=True)
class _Told:
    """A token as log-probabilities tell of it; None for the first of a prompt, which has none."""

    token: int
    logprob: float | None
    top: Top


class Answer:
    """The JSON of one call: `chunk` and `end` of its items for a stream, `whole` for all of it.

    `requests` are those of its answers in order, `n` for each prompt.
    """

    def __init__(
        self, call: Call, requests: Sequence[Request], request_id: str, model: str, tokenizer: Tokenizer, created: int
    ) -> None:
        self._call = call
        self._tokenizer = tokenizer
        self._choices = [_Choice(call, request, index, tokenizer) for index, request in enumerate(requests)]
        suffix = ".chunk" if call.stream and call.chat else ""
        self._head = {
            "id": request_id,
            "object": ("chat.completion" if call.chat else "text_completion") + suffix,
            "created": created,
            "model": model,
        }

    def parts(self, item: Item) -> list[dict[str, Any]]:
        """What a stream says with an item; often nothing."""
        choice = self._choices[item.choice]
        if isinstance(item, PromptScores):
            choice.score(item)
            return []
        parts = [] if choice.begun else [self._part(each) for each in choice.begin()]
        if isinstance(item, Chunk):
            return parts + [self._part(each) for each in choice.chunk(item)]
        return parts + [self._part(each) for each in choice.end(item)]

    def last(self) -> list[dict[str, Any]]:
        """What a stream says when all answers have ended: the usage, where asked for."""
        usage = {"usage": self._usage()} if self._call.include_usage else {}
        more = usage | self._metadata()
        return [self._head | {"choices": []} | more] if more else []

    def _metadata(self) -> dict[str, Any]:
        """What OpenAI has no field for; nothing while all is well."""
        done = [choice.complete for choice in self._choices if choice.complete is not None]
        epochs = sorted({epoch for complete in done for epoch in complete.epochs})
        return {"moejax": {"degraded": True, "epochs": epochs}} if any(c.degraded for c in done) else {}

    def whole(self, items: Iterable[Item]) -> dict[str, Any]:
        """All answers in one piece."""
        for item in items:
            self._choices[item.choice].keep(item)
        whole = self._head | {"choices": [choice.whole() for choice in self._choices], "usage": self._usage()}
        return whole | self._metadata()

    def _part(self, choice: dict[str, Any]) -> dict[str, Any]:
        part = self._head | {"choices": [choice]}
        return part | {"usage": None} if self._call.include_usage else part

    def _usage(self) -> dict[str, Any]:
        """Prompts count once each, whatever `n` is."""
        done = [choice.complete for choice in self._choices if choice.complete is not None]
        prompts = done[:: self._call.params.n]
        asked, told = sum(c.prompt_tokens for c in prompts), sum(c.completion_tokens for c in done)
        return {
            "prompt_tokens": asked,
            "completion_tokens": told,
            "total_tokens": asked + told,
            "prompt_tokens_details": {"cached_tokens": sum(c.cached_tokens for c in prompts)},
        }


class _Choice:
    """One answer of a call."""

    def __init__(self, call: Call, request: Request, index: int, tokenizer: Tokenizer) -> None:
        self._call = call
        self._request = request
        self._index = index
        self._tokenizer = tokenizer
        self._scores: list[_Told] = []
        self._chunks: list[Chunk] = []
        self._tools = ToolCalls() if call.tools else None
        self._called = 0
        self._offset = 0
        self.begun = False
        self.complete: Complete | None = None

    def score(self, item: PromptScores) -> None:
        """Take in scores of the prompt."""
        self._scores += map(_Told, item.token_ids, item.logprobs, item.top)

    def begin(self) -> list[dict[str, Any]]:
        """What a stream says before any text."""
        self.begun = True
        if self._call.chat:
            return [self._part({"delta": {"role": "assistant", "content": ""}})]
        if self._call.echo:
            return [self._part({"text": self._prompt()}, self._logprobs(self._prompt_told()))]
        return []

    def chunk(self, item: Chunk) -> list[dict[str, Any]]:
        """What a stream says with a chunk; nothing when there is nothing to show for these tokens yet."""
        logprobs = self._logprobs(_told([item]))
        if not self._call.chat:
            return [self._part({"text": item.text}, logprobs)] if item.text or logprobs else []
        if self._tools is None:
            return [self._part({"delta": {"content": item.text}}, logprobs)] if item.text or logprobs else []
        deltas = [self._delta(each) for each in self._tools.push(item.text)]
        if logprobs and not deltas:
            deltas = [{"content": ""}]
        return [self._part({"delta": delta}, None if i else logprobs) for i, delta in enumerate(deltas)]

    def end(self, complete: Complete) -> list[dict[str, Any]]:
        """The last parts of an answer: text that was held back, and why it ends."""
        self.complete = complete
        rest = [] if self._tools is None else [self._delta(each) for each in self._tools.flush()]
        empty: dict[str, Any] = {"delta": {}} if self._call.chat else {"text": ""}
        return [*(self._part({"delta": delta}) for delta in rest), self._part(empty, reason=self._reason())]

    def keep(self, item: Item) -> None:
        """Take in an item of an answer that is told in one piece."""
        if isinstance(item, PromptScores):
            self.score(item)
        elif isinstance(item, Chunk):
            self._chunks.append(item)
        else:
            self.complete = item

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        text, told = "".join(chunk.text for chunk in self._chunks), _told(self._chunks)
        if self._call.chat:
            message = self._message(text)
            return self._part({"message": message}, self._logprobs(told), self._reason())
        if self._call.echo:
            text, told = self._prompt() + text, self._prompt_told() + told
        part = self._part({"text": text}, self._logprobs(told), self._reason())
        if self._request.prompt_logprobs is not None and not self._call.echo:
            part["prompt_logprobs"] = [None, *map(self._by_id, self._scores)]
        return part

    def _message(self, text: str) -> dict[str, Any]:
        if self._tools is None:
            return {"role": "assistant", "content": text}
        found = [*self._tools.push(text), *self._tools.flush()]
        said = "".join(each for each in found if isinstance(each, str))
        calls = [self._call_json(each) for each in found if isinstance(each, ToolCall)]
        message: dict[str, Any] = {"role": "assistant", "content": said or (None if calls else "")}
        return message | {"tool_calls": calls} if calls else message

    def _delta(self, found: str | ToolCall) -> dict[str, Any]:
        if isinstance(found, str):
            return {"content": found}
        return {"tool_calls": [{"index": self._called, **self._call_json(found)}]}

    def _call_json(self, call: ToolCall) -> dict[str, Any]:
        name = f"call_{self._request.id[-24:]}_{self._called}"
        self._called += 1
        return {"id": name, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}

    def _reason(self) -> str:
        assert self.complete is not None
        return "tool_calls" if self._called and self.complete.reason == "stop" else self.complete.reason

    def _part(self, choice: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        return choice | {"index": self._index, "logprobs": logprobs, "finish_reason": reason}

    def _prompt(self) -> str:
        given = self._call.prompts[self._index // self._call.params.n]
        return given if isinstance(given, str) else self._tokenizer.decode(self._request.prompt)

    def _prompt_told(self) -> list[_Told]:
        return [_Told(self._request.prompt[0], None, ()), *self._scores]

    def _logprobs(self, told: Sequence[_Told]) -> dict[str, Any] | None:
        if self._call.logprobs is None or not told:
            return None
        if self._call.chat:
            return {"content": [self._entry(t.token, t.logprob) | {"top_logprobs": self._entries(t.top)} for t in told]}
        texts = [self._text(each.token) for each in told]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [None if t.logprob is None else max(t.logprob, _LEAST) for t in told],
            "top_logprobs": [self._by_text(t) for t in told] if self._call.logprobs else None,
            "text_offset": offsets,
        }

    def _by_text(self, told: _Told) -> dict[str, float] | None:
        """The likeliest tokens and the chosen one by their texts; of those that read the same, the likelier."""
        if told.logprob is None:
            return None
        found: dict[str, float] = {}
        for token, logprob in (*told.top, (told.token, told.logprob)):
            found.setdefault(self._text(token), max(logprob, _LEAST))
        return found

    def _by_id(self, told: _Told) -> dict[str, Any]:
        """As vLLM tells of prompt tokens."""
        ranks = {token: rank for rank, (token, _) in enumerate(told.top, 1)}
        return {
            str(token): {
                "logprob": max(logprob, _LEAST),
                "rank": ranks.get(token),
                "decoded_token": self._text(token),
            }
            for token, logprob in dict([*told.top, (told.token, told.logprob or 0.0)]).items()
        }

    def _entries(self, top: Top) -> list[dict[str, Any]]:
        return [self._entry(token, logprob) for token, logprob in top]

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._text(token)
        # Part of a character has bytes that its text does not show.
        shown = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": max(logprob or 0.0, _LEAST), "bytes": shown}

    def _text(self, token: int) -> str:
        return self._tokenizer.decode([token])


def _told(chunks: Sequence[Chunk]) -> list[_Told]:
    return [
        _Told(token, logprob, chunk.top[i] if chunk.top else ())
        for chunk in chunks
        for i, (token, logprob) in enumerate(zip(chunk.token_ids, chunk.logprobs, strict=True))
    ]
