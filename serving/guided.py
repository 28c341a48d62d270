"""Answers that must look like something: which tokens a grammar allows next, by llguidance.

A mask depends on the guide and on the tokens generated so far alone. What is kept here only saves going through
those tokens again, so an answer goes on exactly after a failure.
"""

import collections
import json
import logging
from collections.abc import Sequence
from typing import Any

import llguidance
import numpy as np

from serving.batch import Shaped
from serving.errors import InvalidRequest
from serving.request import Guide
from serving.tokens import Tokenizer
from serving.vocabulary import JsonVocabulary

log = logging.getLogger(__name__)

MAX_GUIDE = 100_000
"""Characters of a guide."""
_KEPT = 1024
"""Requests whose place in their grammar is remembered."""


class Guides:
    """The guides of one model. The tables of its vocabulary are made when the first guide comes."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_tokens: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_tokens = tuple(stop_tokens)
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._places: collections.OrderedDict[str, tuple[llguidance.LLMatcher, int]] = collections.OrderedDict()

    def check(self, guide: Guide) -> None:
        """Raises InvalidRequest when the guide is none, or this model cannot be guided. May take a second."""
        if len(guide.text) > MAX_GUIDE:
            raise InvalidRequest(
                f"the constraint has {len(guide.text)} characters; at most {MAX_GUIDE} are allowed.",
                param=_FIELDS[guide.kind],
            )
        if not self._stop_tokens:
            raise InvalidRequest(
                "this model has no stop token, so a constrained answer could not end.", param=_FIELDS[guide.kind]
            )
        wrong, said = llguidance.LLMatcher.validate_grammar_with_warnings(_grammar(guide), self._ready())
        if wrong:
            raise InvalidRequest(f"the constraint cannot be used: {said[0][:500]}", param=_FIELDS[guide.kind])

    def mask(self, shaped: Shaped) -> np.ndarray:
        """The tokens allowed next, uint32 words of bits. Stop tokens alone when nothing else can follow."""
        request, generated = shaped.request, shaped.generated
        assert request.guide is not None
        matcher, consumed = self._places.pop(request.id, (None, 0))
        if matcher is None or consumed > len(generated):
            matcher, consumed = llguidance.LLMatcher(self._ready(), _grammar(request.guide), log_level=0), 0
        if consumed < len(generated):
            matcher.consume_tokens(list(generated[consumed:]))
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint32)
        if matcher.is_error() or not mask.any():
            if matcher.is_error():
                log.warning("the guide of request %s failed: %s", request.id, matcher.get_error())
            mask = self._only_stop_tokens(len(mask))
        self._places[request.id] = matcher, len(generated)
        while len(self._places) > _KEPT:
            self._places.popitem(last=False)
        return mask

    def _only_stop_tokens(self, words: int) -> np.ndarray:
        mask = np.zeros(words, np.uint32)
        for token in self._stop_tokens:
            mask[token // 32] |= np.uint32(1 << token % 32)
        return mask

    def _ready(self) -> llguidance.LLTokenizer:
        if self._vocabulary is None:
            vocabulary = self._tokenizer.vocabulary
            if not isinstance(vocabulary, JsonVocabulary):
                raise InvalidRequest("answers can be constrained for models with a tokenizer.json only.")
            size = max(self._vocab_size, vocabulary.size)
            self._vocabulary = llguidance.LLTokenizer(
                vocabulary.inner.to_str(), n_vocab=size, eos_token=list(self._stop_tokens)
            )
        return self._vocabulary


_JSON: Any = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}
"""How JSON is spaced; a weak model that may space freely fills its answer with that. `x-guidance` in a schema wins."""
_FIELDS = {"json": "response_format", "regex": "regex", "lark": "structured_outputs", "choice": "choice"}
"""What a caller sent a guide of each kind as."""


def _grammar(guide: Guide) -> str:
    match guide.kind:
        case "json":
            try:
                return llguidance.LLMatcher.grammar_from_json_schema(guide.text, defaults=_JSON)
            except ValueError as error:
                raise InvalidRequest(f"the JSON schema cannot be used: {error}", param="response_format") from None
        case "regex":
            return llguidance.LLMatcher.grammar_from_regex(guide.text)
        case "choice":
            texts = (json.dumps(text, ensure_ascii=False) for text in json.loads(guide.text))
            return llguidance.LLMatcher.grammar_from_lark(f"start: {' | '.join(texts)}")
    return llguidance.LLMatcher.grammar_from_lark(guide.text)
