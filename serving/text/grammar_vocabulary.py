"""The vocabulary of a model as llguidance takes it.

llguidance encodes the text that a grammar leaves no choice about as the tokenizer would, which reads the name of a
special token as that token, although a special token is no text. So its text is encoded by a tokenizer in which no
special token has a name that a text could contain.
"""

import json

import llguidance

from serving.text.tokenizer_formats import HuggingFaceTokenizer


def grammar_vocabulary(
    vocabulary: HuggingFaceTokenizer, size: int, stop_tokens: tuple[int, ...]
) -> llguidance.LLTokenizer:
    """The vocabulary of a tokenizer.json, with `size` tokens. May take seconds."""
    named = llguidance.LLTokenizer(vocabulary.inner.to_str(), n_vocab=size, eos_token=list(stop_tokens))
    nameless = llguidance.LLTokenizer(_without_names(vocabulary.inner.to_str()), n_vocab=size, slices=[])
    wrapper = llguidance.TokenizerWrapper(_Vocabulary(named, nameless, size))
    return llguidance.LLTokenizer(wrapper, n_vocab=size, eos_token=list(stop_tokens))


class _Vocabulary:
    """The vocabulary as `llguidance.TokenizerWrapper` asks for it: the bytes of each token, and an encoder."""

    bos_token_id = None

    def __init__(self, named: llguidance.LLTokenizer, nameless: llguidance.LLTokenizer, size: int) -> None:
        self._nameless = nameless
        self.eos_token_id = named.eos_token
        self.special_token_ids = [token for token in range(size) if named.is_special_token(token)]
        # llguidance takes the byte 255, which no text in UTF-8 has, for a special token without a name.
        self.tokens = [named.decode_bytes([token]) or f"<[{token}]>".encode() for token in range(size)]

    def __call__(self, text: bytes) -> list[int]:
        return self._nameless.tokenize_bytes(text)


def _without_names(tokenizer_json: str) -> str:
    """The tokenizer with names of special tokens that consist of private characters, which no text has."""
    values = json.loads(tokenizer_json)
    names: dict[str, str] = {}
    for token in values.get("added_tokens") or ():
        if token["special"]:
            name, token["content"] = token["content"], f"\ue000{token['id']}\uf8ff"
            names[name] = token["content"]
    vocabulary = values["model"].get("vocab")
    if isinstance(vocabulary, dict):
        values["model"]["vocab"] = {names.get(name, name): token for name, token in vocabulary.items()}
    elif isinstance(vocabulary, list):
        values["model"]["vocab"] = [[names.get(name, name), score] for name, score in vocabulary]
    if values["model"].get("unk_token") in names:
        values["model"]["unk_token"] = names[values["model"]["unk_token"]]
    return json.dumps(values, ensure_ascii=False)
