"""A tokenizer that can be worked out by hand: a token is a byte, and five special ones follow."""

import functools

import tokenizers

from serving.text.chat_template import ChatTemplate
from serving.text.tokenizer import Tokenizer
from serving.text.tokenizer_formats import HuggingFaceTokenizer

TEMPLATE = """{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def byte_tokenizer(template: str | None = TEMPLATE) -> Tokenizer:
    """Token = byte, in the order of their values; then <|end|> (256), <|stop|> (257) and the roles' marks."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=_vocabulary(), merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(["<|end|>", "<|stop|>", "<|user|>", "<|system|>", "<|assistant|>"])
    return Tokenizer(
        HuggingFaceTokenizer(inner), template=None if template is None else ChatTemplate({"default": template}, {})
    )


@functools.cache
def _vocabulary() -> dict[str, int]:
    """The byte that each character of the byte-level alphabet stands for (as GPT-2 defines it)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in visible]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    return {c: hidden[ord(c) - 256] if ord(c) >= 256 else ord(c) for c in alphabet}
