"""Text to tokens and back: encoding, chat templates, and text that grows token by token.

Three values carry a stream: `Tokenizer` is shared by all requests, `Detokenizer` turns one request's
tokens into whole characters, `StopStrings` holds text back while it could be the beginning of a stop.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from serving.chat_template import ChatTemplate
from serving.errors import InvalidRequest
from serving.vocabulary import TokenizerSettings, Vocabulary, load_vocabulary

_INCOMPLETE = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet
_CONTEXT = 8
"""Tokens of the prompt that the first ones of the answer are decoded with."""
_CHARACTER_BYTES = 4
_PENDING = 64
"""So many tokens in a row that end within a character are no text; they are shown as they are."""


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


class Tokenizer:
    """A model's tokenizer, and its chat template where it has one.

    `bos_token` is put in front of a prompt, or a conversation, that does not begin with it. `settings` (of a
    published model) say it otherwise: then prompts get it as the settings say, and conversations as the
    template writes it.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        template: ChatTemplate | None = None,
        bos_token: int | None = None,
        settings: TokenizerSettings | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._template = template
        self._special = True
        self._bos = self._chat_bos = bos_token
        if settings is not None:
            add = not vocabulary.adds_special if settings.add_bos is None else settings.add_bos
            self._special = settings.add_bos is not False
            self._chat_bos = None
            self._bos = vocabulary.index(settings.named.get("bos_token", "")) if add else None

    @classmethod
    def load(cls, folder: Path, *, bos_token: int | None = None, stop_tokens: Sequence[int] = ()) -> Self:
        """Read the tokenizer of a model folder, in any of the forms of `serving.vocabulary`, and its template.

        Raises StartError naming the file that is missing or broken.
        """
        folder = Path(folder)
        settings = TokenizerSettings.load(folder)
        vocabulary = load_vocabulary(folder, settings)
        names = {
            "bos_token": "" if bos_token is None else vocabulary.token(bos_token) or "",
            "eos_token": (vocabulary.token(stop_tokens[0]) or "") if stop_tokens else "",
        }
        template = ChatTemplate.load(folder, settings, names | (dict(settings.named) if settings else {}))
        return cls(vocabulary, template=template, bos_token=bos_token, settings=settings)

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokens themselves."""
        return self._vocabulary

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return self._vocabulary.size

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be called."""
        return self._template is not None

    def encode(self, text: str) -> tuple[int, ...]:
        """The tokens of a prompt. Raises InvalidRequest when the text cannot be written in UTF-8."""
        return _beginning(self._bos, self._encode(text, special=self._special))

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
        return _beginning(self._chat_bos, self._encode(text, special=False))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens; special tokens have none."""
        return self._vocabulary.decode(ids)

    def _encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"character {error.start} of the prompt is half of a surrogate pair, which is no character. "
                "Send valid UTF-8.",
                param="prompt",
            ) from None
        return tuple(self._vocabulary.encode(text, special=special))


def _beginning(bos: int | None, ids: tuple[int, ...]) -> tuple[int, ...]:
    return ids if bos is None or ids[:1] == (bos,) else (bos, *ids)


class Detokenizer:
    """The text of one growing list of tokens, only ever in whole characters.

    A character may be spread over several tokens, and a token's text may depend on the one before it (a
    leading space). So the tokens since the last whole character are decoded together with those before them;
    at the beginning those are the last of `prompt`.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._context = _opening(tokenizer, prompt)
        self._pending: list[int] = []
        self._sent = len(tokenizer.decode(self._context).rstrip(_INCOMPLETE))
        """Characters of the decoded context and pending tokens that are out already."""

    def push(self, token: int) -> str:
        """Text that became certain with this token; often empty, never half a character."""
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
        """What is left when no token will follow; bytes that are no character show as U+FFFD."""
        return self._send_all(self._tokenizer.decode(self._context + self._pending)) if self._pending else ""

    def _send(self, text: str, end: int) -> str:
        start, self._sent = self._sent, max(self._sent, end)
        return text[start:end]

    def _send_all(self, text: str) -> str:
        new = self._send(text, len(text))
        self._context, self._pending = self._pending, []
        self._sent = len(self._tokenizer.decode(self._context))
        return new


def _opening(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
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
        """Text that is certain to come before any stop string. After a match `matched` is set."""
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
        """What was held back, when no text will follow."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
