"""Token masks for structured outputs, by llguidance.

A mask depends only on the grammar and the tokens generated so far. The matchers kept here only save parsing those
tokens again, so an answer continues exactly after a failure.
"""

import collections
import dataclasses
import json
import logging
import re
from collections.abc import Sequence

import llguidance
import numpy as np

from serving.errors import InvalidRequest
from serving.protocol.request import LogitsParams
from serving.protocol.sampling import StructuredOutputs
from serving.text.grammar_vocabulary import grammar_vocabulary
from serving.text.json_schema import SPACING, without_neutral_keywords
from serving.text.tokenizer import Tokenizer
from serving.text.tokenizer_formats import HuggingFaceTokenizer

log = logging.getLogger(__name__)

MAX_GRAMMAR_CHARACTERS = 100_000
"""Longest grammar, in characters."""
_MAX_ITEMS_IN_ROW = 20_000
"""Ways in which a grammar may go on at one place, as after an object's brace with that many optional properties. A mask
takes milliseconds even so; llguidance's own limit is 2,000."""
_MAX_MATCHERS = 1024
"""Requests whose matcher is kept."""
_FIELDS = {
    "json": "response_format",
    "regex": "regex",
    "lark": "structured_outputs",
    "choice": "choice",
    "tools": "tools",
}
"""Request field of each kind of structured output that does not say in which field it was sent."""


class GrammarMatcher:
    """Checks and masks of structured outputs for one model. The first one builds the tables of the vocabulary."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_tokens: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_tokens = tuple(stop_tokens)
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._matchers: collections.OrderedDict[str, tuple[llguidance.LLMatcher, int]] = collections.OrderedDict()
        self._failures: dict[str, InvalidRequest] = {}

    def check(self, constraint: StructuredOutputs) -> None:
        """Raises InvalidRequest, naming the field in which the caller sent it, when a structured output is invalid or
        exceeds a limit, or this model supports none. May take a second."""
        problem = self._problem(constraint)
        if problem is not None:
            param = self._param(constraint)
            raise InvalidRequest(f"{param}: {problem}", param=param)

    def _problem(self, constraint: StructuredOutputs) -> str | None:
        """The fault of a structured output, None without one."""
        if len(constraint.text) > MAX_GRAMMAR_CHARACTERS:
            return (
                f"the constraint has {len(constraint.text)} characters; at most {MAX_GRAMMAR_CHARACTERS} are allowed."
            )
        if not self._stop_tokens:
            return "this model has no stop token, so a constrained answer could not end."
        if not isinstance(self._tokenizer.format, HuggingFaceTokenizer):
            return "answers can be constrained for models with a tokenizer.json only."
        try:
            grammar = self._grammar(constraint)
        except (ValueError, RecursionError) as error:
            return f"the constraint cannot be used: {str(error)[:500]}"
        wrong, said = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, self._llguidance_tokenizer())
        if wrong:
            return f"the constraint cannot be used: {_in_words(said[0])}"
        # Some limits show only when the first token is to be chosen.
        matcher = self._matcher(grammar)
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint32)
        if matcher.is_error():
            return f"the constraint cannot be used: {matcher.get_error()[:500]}"
        return None if mask.any() else "the constraint allows no answer in the tokens of this model."

    def _param(self, constraint: StructuredOutputs) -> str:
        """The field that is at fault: of tools, the parameters of the first one that cannot be used by itself."""
        param = constraint.param or _FIELDS[constraint.kind]
        if constraint.kind != "tools":
            return param
        for tool in json.loads(constraint.text) if "[]" in param else ():
            if self._problem(dataclasses.replace(constraint, text=json.dumps([tool]))) is not None:
                return param.replace("[]", f"[{tool['position']}]")
        return param.partition("[")[0]

    def mask(self, params: LogitsParams) -> np.ndarray:
        """The tokens allowed next, as uint32 words of bits; only stop tokens when nothing else can follow. A grammar
        that fails here allows stop tokens too, and its request is among `take_failures`. After drafts that the grammar
        does not allow, or where it fails, no token is allowed: the step without drafts decides."""
        if params.drafts:
            return self._mask_after_drafts(params)
        request, generated = params.request, params.generated
        matcher = self._matcher_after(params)
        complete = matcher.is_accepting() or matcher.is_stopped()
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint32)
        if matcher.is_error() or not mask.any():
            if matcher.is_error() or not complete:
                self._fail(params, matcher.get_error() or "no token of this model can follow")
            mask = self._only_stop_tokens(len(mask))
        self._keep(request.id, matcher, len(generated))
        return mask

    def _mask_after_drafts(self, params: LogitsParams) -> np.ndarray:
        """The tokens allowed after drafts; none where the drafts are not allowed themselves, or the grammar fails."""
        certain = params.generated[: -params.drafts]
        matcher, drafts = self._matcher_after(params._replace(generated=certain)), params.generated[-params.drafts :]
        mask = np.zeros(1, np.uint32)
        if not matcher.is_error() and matcher.validate_tokens(list(drafts)) == len(drafts):
            matcher.consume_tokens(list(drafts))
            mask = np.frombuffer(matcher.compute_bitmask(), np.uint32)
            complete = matcher.is_accepting() or matcher.is_stopped()
            if not mask.any() and complete and not matcher.is_error():
                mask = self._only_stop_tokens(len(mask))
            matcher.rollback(len(drafts))
        if matcher.is_error():
            self._matchers.pop(params.request.id, None)
        else:
            self._keep(params.request.id, matcher, len(certain))
        return mask

    def _matcher_after(self, params: LogitsParams) -> llguidance.LLMatcher:
        """A matcher that has consumed the generated tokens: the one that is kept, or a new one. It is not kept until
        `_keep`."""
        request, generated = params.request, params.generated
        assert request.sampling.structured_outputs is not None
        matcher, consumed = self._matchers.pop(request.id, (None, 0))
        if matcher is None or consumed > len(generated):
            grammar = self._grammar(request.sampling.structured_outputs)
            matcher, consumed = self._matcher(grammar), 0
        if consumed < len(generated):
            matcher.consume_tokens(list(generated[consumed:]))
        return matcher

    def _keep(self, request_id: str, matcher: llguidance.LLMatcher, consumed: int) -> None:
        self._matchers[request_id] = matcher, consumed
        while len(self._matchers) > _MAX_MATCHERS:
            self._matchers.popitem(last=False)

    def take_failures(self) -> dict[str, InvalidRequest]:
        """The requests whose grammar failed since this was last called, and why. Their answers must not end as if they
        had the form that was asked for."""
        failures, self._failures = self._failures, {}
        return failures

    def _matcher(self, grammar: str) -> llguidance.LLMatcher:
        limits = llguidance.LLParserLimits(max_items_in_row=_MAX_ITEMS_IN_ROW)
        return llguidance.LLMatcher(self._llguidance_tokenizer(), grammar, log_level=0, limits=limits)

    def _fail(self, params: LogitsParams, cause: str) -> None:
        request, constraint = params.request, params.request.sampling.structured_outputs
        assert constraint is not None
        log.warning("the grammar of request %s failed: %s", request.id, cause)
        param = (constraint.param or _FIELDS[constraint.kind]).partition("[")[0]
        self._failures[request.id] = InvalidRequest(
            f"{param}: the constraint failed after {len(params.generated)} tokens, so the answer would not have its "
            f"form: {cause[:500]}. Simplify it.",
            param=param,
        )

    def _only_stop_tokens(self, words: int) -> np.ndarray:
        mask = np.zeros(words, np.uint32)
        for token in self._stop_tokens:
            mask[token // 32] |= np.uint32(1 << token % 32)
        return mask

    def _grammar(self, constraint: StructuredOutputs) -> str:
        """The grammar of a structured output, in the form of llguidance. Raises ValueError or RecursionError."""
        return self._after_reasoning(constraint) if constraint.after else self._whole(constraint)

    def _whole(self, constraint: StructuredOutputs) -> str:
        kind, text = constraint.kind, constraint.text
        if kind == "json":
            schema = json.dumps(without_neutral_keywords(json.loads(text)))
            return llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=SPACING)
        if kind == "regex":
            return llguidance.LLMatcher.grammar_from_regex(text)
        return json.dumps({"grammars": [{"lark_grammar": self._lark(constraint)}]})

    def _lark(self, constraint: StructuredOutputs) -> str:
        if constraint.kind == "tools":
            return self._tokenizer.chat_format.grammar(constraint, self._tokenizer.format)
        if constraint.kind == "choice":
            texts = (json.dumps(text, ensure_ascii=False) for text in json.loads(constraint.text))
            return f"start: CHOICE\nCHOICE: {' | '.join(texts)}\n"  # one lexeme: thousands of texts are no burden
        return constraint.text

    def _after_reasoning(self, constraint: StructuredOutputs) -> str:
        """Any text up to the mark that ends the reasoning, and then the answer in its form."""
        whole = json.loads(self._whole(dataclasses.replace(constraint, after="")))
        reasoning = self._tokenizer.chat_format.text_until(constraint.after, self._tokenizer.format)
        answer = {**whole["grammars"][0], "name": "answer"}
        lark = f"start: reasoning @answer\n{reasoning}"
        return json.dumps({**whole, "grammars": [{"lark_grammar": lark}, answer, *whole["grammars"][1:]]})

    def _llguidance_tokenizer(self) -> llguidance.LLTokenizer:
        if self._vocabulary is None:
            vocabulary = self._tokenizer.format
            assert isinstance(vocabulary, HuggingFaceTokenizer)  # `check` refuses constraints for others
            size = max(self._vocab_size, vocabulary.size)
            self._vocabulary = grammar_vocabulary(vocabulary, size, self._stop_tokens)
        return self._vocabulary


def _in_words(said: str) -> str:
    """The fault that llguidance found in a grammar."""
    if found := re.search(r"Unimplemented keys: \[([^\]]*)\]", said):
        return (
            f"its schema has {found[1]}, which cannot be enforced while an answer is written. Leave it out, and check "
            "the answer by it."
        )
    return said.rpartition("failed to compile JSON schema: ")[2][:500]
