"""A byte tokenizer, a fake backend and the surfaces over it on free loopback ports."""

import pytest

import serving.cache_copy
import serving.loop
import serving.rendezvous
import serving.replacements
import serving.restoration
from serving.generation import Generation
from serving.metrics import Metrics
from serving.tokens import Tokenizer
from tests.fake_backend import FakeBackend
from tests.fake_links import FakeCoordinator
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


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real loop and failover on `tests.fake_links`, in no time."""
    monkeypatch.setattr(serving.rendezvous, "Coordinator", FakeCoordinator)
    for module, name in ((serving.loop, "SETTLE_S"), (serving.loop, "IDLE_S"), (serving.replacements, "GATHER_S")):
        monkeypatch.setattr(module, name, 0.005)
    monkeypatch.setattr(serving.restoration, "is_restored", lambda *_, **__: True)
    monkeypatch.setattr(serving.cache_copy, "PIECE_ENTRIES", 5)
    monkeypatch.setattr(serving.restoration, "FEW_S", 0.0)
    monkeypatch.setattr(serving.restoration, "ALL_S", 0.0)
