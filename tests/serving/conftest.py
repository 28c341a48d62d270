"""A byte tokenizer, a fake backend and the surfaces over it on free loopback ports."""

import pytest

from serving.generation import Generation
from serving.metrics import Metrics
from serving.tokens import Tokenizer
from tests.fake_backend import FakeBackend
from tests.fake_tokens import byte_tokenizer


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def generation(backend: FakeBackend, tokenizer: Tokenizer) -> Generation:
    return Generation(backend, tokenizer, Metrics(backend), draw=lambda: 7)
