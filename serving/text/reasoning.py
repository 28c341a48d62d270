"""Reasoning at the beginning of an answer, between two marks."""

import dataclasses

from serving.text.answer_parts import AnswerPart, Reasoning
from serving.text.marks import MarkScanner


@dataclasses.dataclass(frozen=True)
class ReasoningFormat:
    """The marks around the reasoning of a model."""

    name: str
    begin: str
    end: str

    def starts_inside(self, prompt: str) -> bool:
        """Whether the end of a prompt has begun the reasoning, as the templates of many models do."""
        return prompt.rstrip().endswith(self.begin)


REASONING_FORMATS = {
    each.name: each
    for each in (ReasoningFormat("think", "<think>", "</think>"), ReasoningFormat("mistral", "[THINK]", "[/THINK]"))
}
"""All formats by name. That of gpt-oss is part of its tool format (`tool_formats.harmony`)."""


def reasoning_format_of(template: str) -> ReasoningFormat | None:
    """The format of the models whose chat template this is, None if it marks no reasoning."""
    return next((each for each in REASONING_FORMATS.values() if each.begin in template or each.end in template), None)


class ReasoningParser:
    """Splits the reasoning off the text of one answer, without the marks and the white space beside them. An answer
    that does not begin with the mark has no reasoning."""

    def __init__(self, form: ReasoningFormat, *, inside: bool) -> None:
        """`inside`: the prompt has begun the reasoning."""
        self._form = form
        self._inside = inside
        self._begun = inside
        self._held = ""
        self._end = MarkScanner([form.end])
        self._stripping = True
        """Whether white space is dropped until other text comes."""

    def push(self, text: str) -> list[AnswerPart]:
        """The parts that became final with this text."""
        if not self._begun:
            self._held += text
            text = self._held.lstrip()
            if self._form.begin.startswith(text) and text != self._form.begin:
                return []
            self._begun = True
            if text.startswith(self._form.begin):
                self._inside, text = True, text[len(self._form.begin) :]
            else:
                self._stripping, text = False, self._held
            self._held = ""
        if not self._inside:
            return self._said(text)
        thought, mark, rest = self._end.push(text)
        found = self._thought(thought)
        if mark is not None:
            self._inside, self._held, self._stripping = False, "", True
            found += self._said(rest)
        return found

    def flush(self) -> list[AnswerPart]:
        """The rest, when no text will follow."""
        if self._begun:
            return self._thought(self._end.flush()) if self._inside else []
        held, self._held = self._held, ""
        return [held] if held else []

    def _thought(self, text: str) -> list[AnswerPart]:
        if self._stripping:
            text = text.lstrip()
            self._stripping = not text
        text = self._held + text
        shown = text.rstrip()
        self._held = text[len(shown) :]
        return [Reasoning(shown)] if shown else []

    def _said(self, text: str) -> list[AnswerPart]:
        if self._stripping:
            text = text.lstrip()
            self._stripping = not text
        return [text] if text else []
