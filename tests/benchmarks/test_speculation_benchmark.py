"""The benchmark of speculation sends real text, and fails where drafts change something."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from benchmarks import speculation


@pytest.mark.parametrize("kind", speculation.KINDS)
def test_every_request_has_a_prompt_of_its_own_at_every_concurrency(kind: str) -> None:
    prompts = [ask.prompt for ask in speculation.asks_of(kind, 32, 8)]
    assert min(map(len, prompts)) > 400
    if kind == "prose":
        assert len(set(prompts)) == 32


@pytest.mark.parametrize(("changed", "compiles", "status"), [(0, 0, 0), (1, 0, 1), (0, 2, 1)])
def test_a_changed_token_or_a_compile_is_a_failure(monkeypatch, changed: int, compiles: int, status: int) -> None:
    async def measured(address, arguments):
        return [{"changed": 0, "compiles": 0}, {"changed": changed, "compiles": compiles}]

    monkeypatch.setattr(speculation, "measure_all", measured)
    monkeypatch.setattr(speculation, "launched", lambda *_, **__: nullcontext(SimpleNamespace(address="")))
    monkeypatch.setattr(sys, "argv", ["speculation"])
    assert speculation.main() == status
