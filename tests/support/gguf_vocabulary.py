"""Tokenizer files as they are published, made from the vocabularies that llama.cpp keeps as GGUF."""

from pathlib import Path

import gguf

from moejax.tools.gguf_tokenizer import tokenizer_files


def write_tokenizer(source: Path, folder: Path) -> None:
    """Write the tokenizer of a GGUF file into a model folder, as SentencePiece or as tokenizer.json. No text gets a
    begin token: the ids that llama.cpp keeps beside its vocabularies have none."""
    fields = {field.name: field.contents() for field in gguf.GGUFReader(source).fields.values()}
    for name, content in tokenizer_files(fields | {"tokenizer.ggml.add_bos_token": False}).items():
        (folder / name).write_bytes(content)
