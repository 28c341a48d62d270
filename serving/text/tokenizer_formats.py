"""The tokenizer of a model folder, in whichever form it was published, and what its settings say.

| file | form | read by |
|---|---|---|
| `tokenizer.json` | Hugging Face | `tokenizers` |
| `tokenizer.model`, `tokenizer.model.v*` | SentencePiece | `sentencepiece` |
| `tekken.json` | Mistral's byte-level BPE | `tiktoken` (extra `tekken`) |

The first that is there is used. `tokenizer_config.json` and `special_tokens_map.json` add special tokens,
`tokenizer_config.json` and `additional_chat_templates/` chat templates. Any of these files may begin with a
byte-order mark.
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

from serving.errors import StartError, missing_extra

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
_TEKKEN_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
"""Names of the first special tokens, for an older tekken.json that lists none."""


def _byte_of_character() -> Mapping[str, bytes]:
    """The byte that each character of a byte-level vocabulary stands for: visible ones for themselves, and the others,
    in order, for the bytes without a visible character."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): bytes([byte]) for byte in visible} | {
        chr(256 + place): bytes([byte]) for place, byte in enumerate(hidden)
    }


_BYTE_OF = _byte_of_character()


def _piece_bytes(piece: str) -> bytes:
    """The bytes of a SentencePiece: text with its mark for spaces, or `<0xE2>` for a byte."""
    if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
        return bytes([int(byte[1], 16)])
    return piece.replace("▁", " ").encode()


class TokenizerFormat(Protocol):
    """Text to token ids and back. `adds_special`: `encode(special=True)` adds BOS and EOS by itself."""

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

    def token_bytes(self, index: int) -> bytes:
        """The bytes that a token adds to a text in UTF-8, maybe part of a character; special tokens add none."""
        ...

    def token(self, index: int) -> str | None:
        """The name of a token, None when there is no such token."""
        ...

    def index(self, token: str) -> int | None:
        """The id of a token by its name, None when there is no such token."""
        ...


class HuggingFaceTokenizer:
    """A `tokenizer.json`, without the state of training that such a file may have saved: truncation and padding, which
    `transformers` switches off on loading, and the random merges of BPE dropout."""

    adds_special = True

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        inner.no_truncation()
        inner.no_padding()
        if isinstance(inner.model, tokenizers.models.BPE):
            inner.model.dropout = None
        self.inner = inner
        added = inner.get_added_tokens_decoder()
        self._added = frozenset(added)
        self._special = frozenset(index for index, token in added.items() if token.special)
        self._byte_level = inner.decoder is not None and b'"ByteLevel"' in inner.decoder.__getstate__()

    @property
    def size(self) -> int:
        return self.inner.get_vocab_size()

    def encode(self, text: str, *, special: bool) -> Sequence[int]:
        return self.inner.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(list(ids), skip_special_tokens=True)

    def token_bytes(self, index: int) -> bytes:
        name = self.inner.id_to_token(index)
        if name is None or index in self._special:
            return b""
        if index in self._added:
            return name.encode()
        if self._byte_level:
            return b"".join(_BYTE_OF.get(each, each.encode()) for each in name)
        return _piece_bytes(name)

    def token(self, index: int) -> str | None:
        return self.inner.id_to_token(index)

    def index(self, token: str) -> int | None:
        return self.inner.token_to_id(token)


class SentencePieceTokenizer:
    """A SentencePiece model, with tokens added after training. Text between two special tokens is tokenized by
    itself, with a leading space of its own, as Mistral's and Meta's programs do."""

    adds_special = False

    def __init__(self, model: bytes, added: Mapping[str, tuple[int, bool]]) -> None:
        """`added_tokens` has the id of each added token, and whether it is special (has no text)."""
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
        shown = (i for i in ids if i not in self._silent)
        return "".join(
            "".join(self._added[i] for i in run) if added else self._pieces.decode(list(run))
            for added, run in itertools.groupby(shown, key=lambda i: i in self._added)
        )

    def token_bytes(self, index: int) -> bytes:
        if index in self._silent or not 0 <= index < self.size:
            return b""
        if index in self._added:
            return self._added[index].encode()
        return _piece_bytes(self._pieces.id_to_piece(index))

    def token(self, index: int) -> str | None:
        if index in self._added:
            return self._added[index]
        return self._pieces.id_to_piece(index) if 0 <= index < self._pieces.get_piece_size() else None

    def index(self, token: str) -> int | None:
        if token in self._ids:
            return self._ids[token]
        found = self._pieces.piece_to_id(token)
        known = 0 <= found < self._pieces.get_piece_size()  # a model without an unknown token says -1
        return found if known and self._pieces.id_to_piece(found) == token else None


class TekkenTokenizer:
    """Mistral's `tekken.json`: special tokens first, then a byte-level BPE."""

    adds_special = False

    def __init__(self, values: Mapping[str, Any]) -> None:
        try:
            import tiktoken  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise missing_extra("tekken.json", "tiktoken", "tekken") from None
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

    def token_bytes(self, index: int) -> bytes:
        known = self._first <= index < self.size
        return self._inner.decode_single_token_bytes(index - self._first) if known else b""

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
    """The contents of `tokenizer_config.json`. `add_bos` None leaves the choice to the tokenizer."""

    special_tokens: Mapping[str, str]
    """Special tokens by role: `bos_token`, `eos_token`, `pad_token`, ..."""
    added_tokens: Mapping[str, tuple[int, bool]]
    """Id of each added token, and whether it is special."""
    add_bos: bool | None
    templates: Mapping[str, str]
    """Chat templates by name; the usual one is `default`."""
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The file as it is."""

    @classmethod
    def load(cls, folder: Path) -> "TokenizerSettings | None":
        """The settings of a model folder, None when it has none. Raises StartError when the file is invalid."""
        path = folder / TOKENIZER_CONFIG
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text("utf-8-sig"))
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
            roles = _roles(values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StartError(f"{path} cannot be read: {type(error).__name__}: {error}.") from error
        mapped = _special_tokens_map(folder)
        # As in transformers, the map wins over a config of the time before `added_tokens_decoder`.
        named = {**mapped, **roles} if added else {**roles, **mapped}
        return cls(special_tokens=named, added_tokens=added, add_bos=add_bos, templates=templates, values=values)


def load_tokenizer(folder: Path, settings: TokenizerSettings | None) -> TokenizerFormat:
    """The tokenizer of a model folder. Raises StartError naming the file that is missing or broken."""
    path = next(tokenizer_files(folder), None)
    if path is None:
        raise StartError(
            f"{folder / 'tokenizer.json'} does not exist, nor tokenizer.model or tekken.json; "
            "a model folder holds config.json, params/ and one of them."
        )
    try:
        if path.name == "tokenizer.json":
            return HuggingFaceTokenizer(tokenizers.Tokenizer.from_str(path.read_text("utf-8-sig")))
        if path.name == "tekken.json":
            return TekkenTokenizer(json.loads(path.read_text("utf-8-sig")))
        return SentencePieceTokenizer(path.read_bytes(), settings.added_tokens if settings else {})
    except StartError:
        raise
    except Exception as error:  # the libraries, Rust and C++, raise plain Exception and RuntimeError
        raise StartError(f"{path} is no tokenizer: {error}.") from error


def tokenizer_files(folder: Path) -> Iterator[Path]:
    """The tokenizers of a model folder, the preferred one first."""
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer.model.v*", "tekken.json"):
        yield from sorted(folder.glob(name), reverse=True)


def _special_tokens_map(folder: Path) -> dict[str, str]:
    path = folder / SPECIAL_TOKENS_MAP
    if not path.is_file():
        return {}
    try:
        return _roles(json.loads(path.read_text("utf-8-sig")))
    except (ValueError, AttributeError) as error:
        raise StartError(f"{path} cannot be read: {type(error).__name__}: {error}.") from error


def _roles(values: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens of a JSON object by role; each is a text or an object with its `content`."""
    roles = {k: _content(v) for k, v in values.items() if k.endswith("_token")}
    return {k: v for k, v in roles.items() if isinstance(v, str)}


def _content(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value
