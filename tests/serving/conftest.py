"""A byte tokenizer, a fake backend and the surfaces over it on free loopback ports."""

import dataclasses
from collections.abc import Iterator

import pytest

import serving.core.loop
import serving.core.step_runner
import serving.executor.kv_replica
import serving.recovery.due
import serving.recovery.kv_restoration
import serving.recovery.rendezvous
import serving.recovery.weights_update
from serving.core.request_processor import RequestProcessor
from serving.observability.metrics import Metrics
from serving.protocol.prepared_model import PreparedModel
from serving.text.tokenizer import Tokenizer
from simulation.byte_tokenizer import byte_tokenizer
from tests.support.fake_backend import FakeBackend
from tests.support.fake_executor import FakeCoordinator
from tests.support.fake_server import FakeServer, serve_in_thread


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def processor(backend: FakeBackend, tokenizer: Tokenizer) -> RequestProcessor:
    return RequestProcessor(backend, tokenizer, Metrics(backend), draw_seed=lambda: 7)


@pytest.fixture
def server(backend: FakeBackend) -> Iterator[FakeServer]:
    """Both surfaces over the fake backend, in a thread."""
    with serve_in_thread(backend) as server:
        yield server


async def prepare_weights(model: str, like: PreparedModel, **_: object) -> PreparedModel:
    """Other weights of the fake model, on no disk."""
    return dataclasses.replace(like, store=model)


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real loop and failover on `tests.support.fake_executor`, in no time."""
    monkeypatch.setattr(serving.recovery.rendezvous, "Coordinator", FakeCoordinator)
    for module, name in (
        (serving.core.step_runner, "SETTLE_S"),
        (serving.core.loop, "IDLE_S"),
        (serving.recovery.due, "GATHER_S"),
    ):
        monkeypatch.setattr(module, name, 0.005)
    monkeypatch.setattr(serving.recovery.weights_update, "prepare_weights", prepare_weights)
    monkeypatch.setattr(serving.recovery.weights_update, "POLL_S", 0.0)
    monkeypatch.setattr(serving.recovery.kv_restoration, "should_restore", lambda *_, **__: True)
    monkeypatch.setattr(serving.executor.kv_replica, "PIECE_ENTRIES", 5)
    monkeypatch.setattr(serving.recovery.kv_restoration, "MIN_BUDGET_S", 0.0)
    monkeypatch.setattr(serving.recovery.kv_restoration, "MAX_BUDGET_S", 0.0)
