"""The tokenizer of a model folder, in whichever form it was published, and what its settings say.

| file | form | read by |
|---|---|---|
| `tokenizer.json` | Hugging Face | `tokenizers` |
| `tokenizer.model`, `tokenizer.model.v*` | SentencePiece | `sentencepiece` |
| `tekken.json` | Mistral's byte-level BPE | `tiktoken` (extra `tekken`) |

The first that is there is used. `tokenizer_config.json` adds special tokens and chat templates.
"""

import base64
import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from serving.errors import StartError

SETTINGS = "tokenizer_config.json"
_TEKKEN_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
"""Names of the first special tokens where an older tekken.json lists none."""


class Vocabulary(Protocol):
    """Text to token ids and back. `adds_special` says that `encode(special=True)` frames the text by itself."""

    adds_special: bool

    @property
    def size(self) -> int:
        """Number of tokens, special ones included."""
        ...

    def encode(self, text: str, *, special: bool) -> Sequence[int]:
        """The tokens of a text, in which the names of special tokens stand for them."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens; special tokens have none, bytes that are no character show as U+FFFD."""
        ...

    def token(self, index: int) -> str | None:
        """The name of a token, None when there is no such token."""
        ...

    def index(self, token: str) -> int | None:
        """The id of a token by its name, None when there is no such token."""
        ...


class JsonVocabulary:
    """A `tokenizer.json`."""

    adds_special = True

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self.inner = inner

    @property
    def size(self) -> int:
        return self.inner.get_vocab_size()

    def encode(self, text: str, *, special: bool) -> Sequence[int]:
        return self.inner.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(list(ids), skip_special_tokens=True)

    def token(self, index: int) -> str | None:
        return self.inner.id_to_token(index)

    def index(self, token: str) -> int | None:
        return self.inner.token_to_id(token)


class SentencePieceVocabulary:
    """A SentencePiece model, with tokens added after training. What stands between two special tokens is
    tokenised by itself, with a leading space of its own, as Mistral's and Meta's programs do."""

    adds_special = False

    def __init__(self, model: bytes, added: Mapping[str, tuple[int, bool]]) -> None:
        """`added` has the id of each added token, and whether it is special (has no text)."""
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        control = [i for i in range(self._pieces.get_piece_size()) if self._pieces.is_control(i)]
        names = {self._pieces.id_to_piece(i): i for i in control}
        self._ids = names | {name: i for name, (i, _) in added.items()}
        self._added = {i: name for name, (i, _) in added.items() if i >= self._pieces.get_piece_size()}
        self._silent = {*control, *(i for i, special in added.values() if special)}
        marks = "|".join(re.escape(name) for name in sorted(self._ids, key=len, reverse=True) if name)
        self._marks = re.compile(f"({marks})") if marks else None

    @property
    def size(self) -> int:
        return max([self._pieces.get_piece_size(), *(i + 1 for i in self._added)])

    def encode(self, text: str, *, special: bool) -> Sequence[int]:
        parts = self._marks.split(text) if self._marks else [text]
        ids: list[int] = []
        for position, part in enumerate(parts):
            if position % 2:
                ids.append(self._ids[part])
            elif part:
                ids += self._pieces.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        heard = (i for i in ids if i not in self._silent)
        return "".join(
            "".join(self._added[i] for i in run) if added else self._pieces.decode(list(run))
            for added, run in itertools.groupby(heard, key=lambda i: i in self._added)
        )

    def token(self, index: int) -> str | None:
        if index in self._added:
            return self._added[index]
        return self._pieces.id_to_piece(index) if 0 <= index < self._pieces.get_piece_size() else None

    def index(self, token: str) -> int | None:
        if token in self._ids:
            return self._ids[token]
        found = self._pieces.piece_to_id(token)
        return found if self._pieces.id_to_piece(found) == token else None


class TekkenVocabulary:
    """Mistral's `tekken.json`: special tokens first, then a byte-level BPE."""

    adds_special = False

    def __init__(self, values: Mapping[str, Any]) -> None:
        try:
            import tiktoken  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise StartError("tekken.json needs tiktoken: pip install 'moejax[tekken]'.") from None
        config = values["config"]
        self._first = int(config["default_num_special_tokens"])
        listed = [t["token_str"] for t in values.get("special_tokens") or ()] or list(_TEKKEN_SPECIAL)
        self._special = (listed + [f"<SPECIAL_{i}>" for i in range(len(listed), self._first)])[: self._first]
        words = values["vocab"][: int(config["default_vocab_size"]) - self._first]
        ranks = {base64.b64decode(word["token_bytes"]): word["rank"] for word in words}
        # The names of special tokens get the ids after the words here, and their own again on the way out.
        special = {name: len(ranks) + i for i, name in enumerate(self._special)}
        self._inner = tiktoken.Encoding(
            "tekken", pat_str=config["pattern"], mergeable_ranks=ranks, special_tokens=special
        )
        self._words = len(ranks)

    @property
    def size(self) -> int:
        return self._first + self._words

    def encode(self, text: str, *, special: bool) -> Sequence[int]:
        ids = self._inner.encode(text, allowed_special="all")
        return [i + self._first if i < self._words else i - self._words for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        return self._inner.decode([i - self._first for i in ids if i >= self._first], errors="replace")

    def token(self, index: int) -> str | None:
        if 0 <= index < self._first:
            return self._special[index]
        known = index < self.size
        return self._inner.decode_single_token_bytes(index - self._first).decode(errors="replace") if known else None

    def index(self, token: str) -> int | None:
        if token in self._special:
            return self._special.index(token)
        try:
            return self._first + self._inner.encode_single_token(token)
        except KeyError:
            return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """What `tokenizer_config.json` says. `add_bos` None leaves it to the tokenizer."""

    named: Mapping[str, str]
    """Special tokens by role: `bos_token`, `eos_token`, `pad_token`, ..."""
    added: Mapping[str, tuple[int, bool]]
    """Id of each added token, and whether it is special."""
    add_bos: bool | None
    templates: Mapping[str, str]
    """Chat templates by name; the usual one is `default`."""

    @classmethod
    def load(cls, folder: Path) -> "TokenizerSettings | None":
        """The settings of a model folder, None when it has none. Raises StartError on what is no such file."""
        path = folder / SETTINGS
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text())
            roles = {k: _content(v) for k, v in values.items() if k.endswith("_token") and v is not None}
            added = {
                t["content"]: (int(i), bool(t.get("special")))
                for i, t in (values.get("added_tokens_decoder") or {}).items()
            }
            templates = values.get("chat_template") or {}
            if isinstance(templates, str):
                templates = {"default": templates}
            elif not isinstance(templates, dict):
                templates = {t["name"]: t["template"] for t in templates}
            add_bos = values.get("add_bos_token")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StartError(f"{path} cannot be read: {type(error).__name__}: {error}.") from error
        named = {k: v for k, v in roles.items() if isinstance(v, str)}
        return cls(named=named, added=added, add_bos=add_bos, templates=templates)


def load_vocabulary(folder: Path, settings: TokenizerSettings | None) -> Vocabulary:
    """The tokenizer of a model folder. Raises StartError naming the file that is missing or broken."""
    path = next(tokenizer_files(folder), None)
    if path is None:
        raise StartError(
            f"{folder / 'tokenizer.json'} does not exist, nor tokenizer.model or tekken.json; "
            "a model folder holds config.json, params/ and one of them."
        )
    try:
        if path.name == "tokenizer.json":
            return JsonVocabulary(tokenizers.Tokenizer.from_file(str(path)))
        if path.name == "tekken.json":
            return TekkenVocabulary(json.loads(path.read_text()))
        return SentencePieceVocabulary(path.read_bytes(), settings.added if settings else {})
    except StartError:
        raise
    except Exception as error:  # the libraries, Rust and C++, raise plain Exception and RuntimeError
        raise StartError(f"{path} is no tokenizer: {error}.") from error


def tokenizer_files(folder: Path) -> Iterator[Path]:
    """The tokenizers of a model folder, the preferred one first."""
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer.model.v*", "tekken.json"):
        yield from sorted(folder.glob(name), reverse=True)


def _content(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value
