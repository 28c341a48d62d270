"""The fixtures of the server's tests."""

from tests.serving.conftest import anyio_backend, backend, processor, tokenizer

__all__ = ["anyio_backend", "backend", "processor", "tokenizer"]
