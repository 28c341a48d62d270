"""Text to tokens and back: encoding, chat templates, and text that grows token by token.

Three values carry a stream: `Tokenizer` is shared by all requests, `Detokenizer` turns one request's
tokens into whole characters, `StopStrings` holds text back while it could be the beginning of a stop.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from serving.errors import InvalidRequest, StartError
from serving.protocol.request import AnswerParsing
from serving.text.chat_format import AUTO, ChatFormat
from serving.text.chat_template import ChatTemplate
from serving.text.tokenizer_formats import TokenizerFormat, TokenizerSettings, load_tokenizer

_INCOMPLETE = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet
_CONTEXT = 8
"""Prompt tokens that the first generated tokens are decoded with."""
_CHARACTER_BYTES = 4
_PROMPT_END = 16
"""Prompt tokens that are searched for a mark that begins the reasoning."""
_PENDING = 64
"""Number of consecutive tokens ending within a character after which they are shown as they are."""


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


class Tokenizer:
    """A model's tokenizer, and its chat template where it has one.

    `bos_token` is prepended to prompts and conversations that do not begin with it. With `settings` (of a published
    model) prompts get it as the settings say, and conversations as the template writes it.
    """

    def __init__(
        self,
        vocabulary: TokenizerFormat,
        *,
        template: ChatTemplate | None = None,
        bos_token: int | None = None,
        settings: TokenizerSettings | None = None,
        chat_format: ChatFormat | None = None,
        folder: Path | None = None,
    ) -> None:
        self._format = vocabulary
        self.folder = folder
        """The model folder that it was read from."""
        self.chat_format = chat_format or ChatFormat.of("" if template is None else template.text)
        self._shown_marks = self.chat_format.shown_marks(vocabulary)
        self._template = template
        self._settings = settings
        self._special = True
        self._bos = self._chat_bos = bos_token
        if settings is not None:
            add = not vocabulary.adds_special if settings.add_bos is None else settings.add_bos
            self._special = settings.add_bos is not False
            self._chat_bos = None
            self._bos = vocabulary.index(settings.special_tokens.get("bos_token", "")) if add else None

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        bos_token: int | None = None,
        stop_tokens: Sequence[int] = (),
        chat_template: Path | None = None,
        tool_call_parser: str = AUTO,
        reasoning_parser: str = AUTO,
    ) -> Self:
        """Read the tokenizer of a model folder, in any of the forms of `serving.text.tokenizer_formats`, and its
        template, or that of the file `chat_template`. `serving.text.chat_format` has the names of the parsers.

        Raises StartError naming the file that is missing or broken, or the parser that is unknown.
        """
        folder = Path(folder)
        settings = TokenizerSettings.load(folder)
        vocabulary = load_tokenizer(folder, settings)
        names = {
            "bos_token": "" if bos_token is None else vocabulary.token(bos_token) or "",
            "eos_token": (vocabulary.token(stop_tokens[0]) or "") if stop_tokens else "",
        }
        names |= dict(settings.special_tokens) if settings else {}
        template = ChatTemplate.load(folder, settings, names, chat_template)
        text = "" if template is None else template.text
        chat_format = ChatFormat.of(text, tool_call_parser, reasoning_parser)
        parts: dict[str, Any] = {"settings": settings, "chat_format": chat_format, "folder": folder}
        return cls(vocabulary, template=template, bos_token=bos_token, **parts)

    def check_begin_tokens(self, vocab_size: int) -> None:
        """Check the tokens that this tokenizer puts in front of every text. Raises StartError for one that the model's
        vocabulary lacks: no text could be served."""
        text = "a"
        ids, plain = self.encode(text), self._encode(text, special=False)
        for token in ids[: len(ids) - len(plain)]:
            if not 0 <= token < vocab_size:
                raise StartError(
                    f"the tokenizer begins every text with token {token} ({self._format.token(token)!r}), and the "
                    f"model's vocabulary has {vocab_size} tokens, 0 to {vocab_size - 1}. Correct bos_token or "
                    "add_bos_token in the tokenizer's files."
                )

    @property
    def format(self) -> TokenizerFormat:
        """The tokenizer in the form it was published in."""
        return self._format

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return self._format.size

    @property
    def info(self) -> dict[str, Any]:
        """The contents of `tokenizer_config.json`, with the special tokens and the chat template from any file."""
        found = dict(self._settings.values) | dict(self._settings.special_tokens) if self._settings else {}
        if self._template is not None:
            found["chat_template"] = self._template.default
        return {"tokenizer_class": "PreTrainedTokenizerFast", **found}

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be called."""
        return self._template is not None

    def encode(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """The tokens of a prompt; with `special` also the ones that the tokenizer puts around every text. Raises
        InvalidRequest when the text cannot be written in UTF-8."""
        if not special:
            return self._encode(text, special=False)
        return _with_bos(self._bos, self._encode(text, special=self._special))

    def chat(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """The tokens of a conversation, ending where the assistant's next turn begins.

        Messages given as mappings reach the template as they are. `tools` are JSON schemas of functions,
        `variables` the template's own switches. Raises InvalidRequest when the template refuses them.
        """
        if self._template is None:
            raise InvalidRequest(
                "this model has no chat template, so it cannot hold a conversation. Send a plain prompt instead.",
                param="messages",
            )
        turns = [dataclasses.asdict(m) if isinstance(m, Message) else m for m in messages]
        text = self._template.render(turns, tools=tools, variables=variables)
        return _with_bos(self._chat_bos, self._encode(text, special=False))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens; special tokens have none."""
        return self._format.decode(ids)

    def answer_parsing(
        self, prompt: Sequence[int], tools: Sequence[Mapping[str, Any]], parallel: bool
    ) -> AnswerParsing:
        """How the answer to a conversation is read; `prompt` is its tokens."""
        reasoning = self.chat_format.reasoning
        end = "" if reasoning is None else self.decode_marked(prompt[-_PROMPT_END:])
        inside = reasoning is not None and reasoning.starts_inside(end)
        return AnswerParsing(tools=tuple(tools), parallel=parallel, inside_reasoning=inside)

    def decode_marked(self, ids: Sequence[int]) -> str:
        """The text of tokens, with the names of the special tokens that mark reasoning and tool calls."""
        if self._shown_marks.isdisjoint(ids):
            return self.decode(ids)
        runs = itertools.groupby(ids, key=self._shown_marks.__contains__)
        return "".join(
            "".join(self._format.token(i) or "" for i in run) if marks else self.decode(list(run))
            for marks, run in runs
        )

    def is_shown_mark(self, token: int) -> bool:
        """Whether a token is a special one that marks reasoning or tool calls."""
        return token in self._shown_marks

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token adds to a text in UTF-8, maybe part of a character; special tokens add none."""
        return self._format.token_bytes(token)

    def _encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"character {error.start} of the prompt is half of a surrogate pair, which is no character. "
                "Send valid UTF-8.",
                param="prompt",
            ) from None
        return tuple(self._format.encode(text, special=special))


def _with_bos(bos: int | None, ids: tuple[int, ...]) -> tuple[int, ...]:
    return ids if bos is None or ids[:1] == (bos,) else (bos, *ids)


class Detokenizer:
    """The text of one growing list of tokens, only ever in whole characters.

    A character may be spread over several tokens, and a token's text may depend on the one before it (a
    leading space). So the tokens since the last whole character are decoded together with those before them;
    at the beginning those are the last of `prompt`. With `marks`, the special tokens that mark reasoning and tool calls
    have text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), *, marks: bool = False) -> None:
        self._tokenizer = tokenizer
        self._marks = marks
        self._context = _prompt_context(tokenizer, prompt)
        self._pending: list[int] = []
        self._sent = len(tokenizer.decode(self._context).rstrip(_INCOMPLETE))
        """Characters of the decoded context and pending tokens that were returned already."""

    def push(self, token: int) -> str:
        """Text that became final with this token; often empty, never half a character."""
        if self._marks and self._tokenizer.is_shown_mark(token):
            text = self.flush()
            self._context, self._pending = [token], []
            self._sent = len(self._tokenizer.decode(self._context))
            return text + self._tokenizer.decode_marked([token])
        self._pending.append(token)
        text = self._tokenizer.decode(self._context + self._pending)
        if text.endswith(_INCOMPLETE) and len(self._pending) < _PENDING:
            return self._send(text, len(text.rstrip(_INCOMPLETE)))
        if len(text) > self._sent:
            return self._send_all(text)
        if len(self._pending) >= _PENDING:
            self._pending = []  # tokens without text
        return ""

    def flush(self) -> str:
        """The remaining text when no token will follow; bytes that are no character show as U+FFFD."""
        return self._send_all(self._tokenizer.decode(self._context + self._pending)) if self._pending else ""

    def _send(self, text: str, end: int) -> str:
        start, self._sent = self._sent, max(self._sent, end)
        return text[start:end]

    def _send_all(self, text: str) -> str:
        new = self._send(text, len(text))
        self._context, self._pending = self._pending, []
        self._sent = len(self._tokenizer.decode(self._context))
        return new


def _prompt_context(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """The last tokens of a prompt, from where a character begins."""
    for length in range(_CONTEXT, _CONTEXT - _CHARACTER_BYTES, -1):
        context = list(prompt[-length:])
        if not tokenizer.decode(context).startswith(_INCOMPLETE):
            return context
    return []


class StopStrings:
    """Passes text on up to the first stop string, and holds back what could be the beginning of one.

    First means the one that is complete first; the result does not depend on how the text was split.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Text that certainly comes before any stop string. After a match `matched` is set."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(text.index(s) + len(s), text.index(s), s) for s in self._stops if s in text]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[:start]
        keep = max((_overlap(text, s) for s in self._stops), default=0)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """The text held back, when no text will follow."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
