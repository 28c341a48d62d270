"""Log-probabilities of tokens in OpenAI's and vLLM's formats."""

import codecs
import dataclasses
from collections.abc import Sequence

from serving.api.http.openai_objects import ChatLogprobs, PromptLogprob, TextLogprobs, TokenLogprob, TopLogprob
from serving.core.answers import Chunk
from serving.protocol.sampling import TopLogprobs
from serving.text.tokenizer import Tokenizer

_MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot express."""


@dataclasses.dataclass(frozen=True)
class ScoredToken:
    """A token with its log-probability (None for the first token of a prompt) and the likeliest alternatives."""

    token: int
    logprob: float | None
    top: TopLogprobs


def scored_tokens(chunks: Sequence[Chunk]) -> list[ScoredToken]:
    """The tokens of chunks."""
    return [
        ScoredToken(token, logprob, chunk.top[i] if chunk.top else ())
        for chunk in chunks
        for i, (token, logprob) in enumerate(zip(chunk.token_ids, chunk.logprobs, strict=True))
    ]


class TextOffsets:
    """The places of tokens in a growing text, in characters. A token that begins within a character is at the place of
    that character."""

    def __init__(self, start: int = 0) -> None:
        self._offset = start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def place(self, token: bytes) -> int:
        """Where the next token begins."""
        offset = max(0, self._offset)
        self._offset += len(self._decoder.decode(token))
        return offset


class LogprobFormat:
    """Writes the log-probabilities of one answer. `alternatives` is the number of likeliest tokens that were
    requested."""

    def __init__(self, tokenizer: Tokenizer, alternatives: int) -> None:
        self._tokenizer = tokenizer
        self._alternatives = alternatives
        self.offsets = TextOffsets()

    def of_chat(self, tokens: Sequence[ScoredToken]) -> ChatLogprobs:
        """In the format of chat completions."""
        return ChatLogprobs(
            content=[
                TokenLogprob(
                    token=self._text(each.token),
                    logprob=_finite(each.logprob),
                    bytes=list(self._tokenizer.token_bytes(each.token)),
                    top_logprobs=[self._alternative(token, logprob) for token, logprob in each.top],
                )
                for each in tokens
            ]
        )

    def of_text(self, tokens: Sequence[ScoredToken]) -> TextLogprobs:
        """In the format of completions."""
        return TextLogprobs(
            tokens=[self._text(each.token) for each in tokens],
            token_logprobs=[None if each.logprob is None else _finite(each.logprob) for each in tokens],
            top_logprobs=[self._by_text(each) for each in tokens] if self._alternatives else None,
            text_offset=[self.offsets.place(self._tokenizer.token_bytes(each.token)) for each in tokens],
        )

    def by_id(self, entry: ScoredToken) -> dict[str, PromptLogprob]:
        """By token id, in vLLM's format of prompt_logprobs."""
        ranks = {token: rank for rank, (token, _) in enumerate(entry.top, 1)}
        found = dict([*entry.top, (entry.token, entry.logprob or 0.0)])
        return {
            str(token): PromptLogprob(logprob=_finite(logprob), rank=ranks.get(token), decoded_token=self._text(token))
            for token, logprob in found.items()
        }

    def _by_text(self, entry: ScoredToken) -> dict[str, float] | None:
        """The likeliest tokens and the sampled one by text; of equal texts, the likelier."""
        if entry.logprob is None:
            return None
        found: dict[str, float] = {}
        for token, logprob in (*entry.top, (entry.token, entry.logprob)):
            found.setdefault(self._text(token), _finite(logprob))
        return found

    def _alternative(self, token: int, logprob: float) -> TopLogprob:
        text, data = self._text(token), self._tokenizer.token_bytes(token)
        return TopLogprob(token=text, logprob=_finite(logprob), bytes=list(data))

    def _text(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode(errors="replace")


def _finite(logprob: float | None) -> float:
    return max(logprob or 0.0, _MIN_LOGPROB)
