"""Text to tokens and back: encoding, chat templates, and text that grows token by token.

Three values carry a stream: `Tokenizer` is shared by all requests, `Detokenizer` turns one request's
tokens into whole characters, `StopStrings` holds text back while it could be the beginning of a stop.
"""

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import jinja2
import jinja2.sandbox
import tokenizers

from serving.errors import InvalidRequest, StartError

_INCOMPLETE = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


class Tokenizer:
    """A model's tokenizer.json, and its chat template where it has one.

    `bos_token` is put in front of a prompt that does not begin with it.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        template: str | None = None,
        bos_token: int | None = None,
        stop_tokens: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._bos = bos_token
        self._names = {
            "bos_token": "" if bos_token is None else tokenizer.id_to_token(bos_token) or "",
            "eos_token": (tokenizer.id_to_token(stop_tokens[0]) or "") if stop_tokens else "",
        }
        self._template = None if template is None else _environment().from_string(template)

    @classmethod
    def load(cls, folder: Path, *, bos_token: int | None = None, stop_tokens: Sequence[int] = ()) -> Self:
        """Read `tokenizer.json` and, if it is there, `chat_template.jinja` of a model folder."""
        path, template = Path(folder) / "tokenizer.json", Path(folder) / "chat_template.jinja"
        if not path.is_file():
            raise StartError(f"{path} does not exist; a model folder holds config.json, tokenizer.json and params/.")
        try:
            return cls(
                tokenizers.Tokenizer.from_file(str(path)),
                template=template.read_text() if template.is_file() else None,
                bos_token=bos_token,
                stop_tokens=stop_tokens,
            )
        except jinja2.TemplateSyntaxError as error:
            raise StartError(f"{template}, line {error.lineno}: {error.message}.") from error
        except Exception as error:  # the Rust library raises plain Exception
            raise StartError(f"{path} is no tokenizer: {error}.") from error

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return self._tokenizer.get_vocab_size()

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be called."""
        return self._template is not None

    def encode(self, text: str) -> tuple[int, ...]:
        """The tokens of a prompt. Raises InvalidRequest when the text cannot be written in UTF-8."""
        return self._with_bos(self._encode(text, add_special_tokens=True))

    def chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The tokens of a conversation, ending where the assistant's next turn begins."""
        if self._template is None:
            raise InvalidRequest(
                "this model has no chat template, so it cannot hold a conversation. Send a plain prompt instead.",
                param="messages",
            )
        turns = [dataclasses.asdict(m) for m in messages]
        try:
            text = self._template.render(messages=turns, add_generation_prompt=True, **self._names)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InvalidRequest(f"the chat template refuses these messages: {error}", param="messages") from error
        return self._with_bos(self._encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens; special tokens have none."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def _with_bos(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        if self._bos is None or ids[:1] == (self._bos,):
            return ids
        return (self._bos, *ids)

    def _encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"character {error.start} of the prompt is half of a surrogate pair, which is no character. "
                "Send valid UTF-8.",
                param="prompt",
            ) from None
        return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)


class Detokenizer:
    """The text of one growing list of tokens, only ever in whole characters.

    A character may be spread over several tokens, and a token's text may depend on the one before it (a
    leading space). So the tokens since the last whole character are decoded together with those before them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Text that became certain with this token; often empty, never half a character."""
        self._pending.append(token)
        text = self._text()
        if not text or text.endswith(_INCOMPLETE):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """What is left when no token will follow; bytes that are no character show as U+FFFD."""
        text = self._text()
        self._context, self._pending = self._pending, []
        return text

    def _text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]


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


def _environment() -> jinja2.Environment:
    """What chat templates expect to find. They come with the model, so they run in a sandbox."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.filters["tojson"] = _to_json
    return environment


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON as the template's author meant it; Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
