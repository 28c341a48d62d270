"""The fixtures of the server's tests."""

from tests.serving.conftest import backend, processor, tokenizer

__all__ = ["backend", "processor", "tokenizer"]
