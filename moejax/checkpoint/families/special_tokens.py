"""Ids of the special tokens of a published folder, read from the files of its tokenizer without loading it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.inputs.published.reader import read_json_object

TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP = "tokenizer_config.json", "special_tokens_map.json"


def end_token(folder: Path) -> int | None:
    """The id of the tokenizer's `eos_token`, at which `transformers` and vLLM stop too; None if it names none or the
    files do not say its id. Raises InputError for a file that is no JSON object."""
    settings = _json(folder / TOKENIZER_CONFIG)
    name = _content(settings.get("eos_token")) or _content(_json(folder / SPECIAL_TOKENS_MAP).get("eos_token"))
    if not isinstance(name, str):
        return None
    for token, added in (settings.get("added_tokens_decoder") or {}).items():
        if _content(added) == name and token.isdecimal():
            return int(token)
    tokenizer = _json(folder / "tokenizer.json")
    for added in tokenizer.get("added_tokens") or ():
        if _content(added) == name and isinstance(added.get("id"), int):
            return added["id"]
    vocabulary = (tokenizer.get("model") or {}).get("vocab")
    found = vocabulary.get(name) if isinstance(vocabulary, dict) else None
    return found if isinstance(found, int) else None


def _json(path: Path) -> Mapping[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _content(value: Any) -> Any:
    """The text of a token, which is written as it is or as an object."""
    return value.get("content") if isinstance(value, dict) else value
