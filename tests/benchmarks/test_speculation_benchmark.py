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
    async def measured(addresses, arguments):
        assert addresses == {"ngram": "", "mtp": ""}
        run = {"concurrency": 1, "text": "code", "gain": 1.5, "tokens_a_step": 2.0, "changed": 0, "compiles": 0}
        return [run | {"way": "ngram"}, run | {"way": "mtp", "changed": changed, "compiles": compiles}]

    monkeypatch.setattr(speculation, "measure_all", measured)
    monkeypatch.setattr(speculation, "launched", lambda *_, **__: nullcontext(SimpleNamespace(address="")))
    monkeypatch.setattr(sys, "argv", ["speculation", "--drafts", "ngram,mtp"])
    assert speculation.main() == status


def test_a_table_has_a_line_for_each_load_and_a_column_for_each_way_to_draft() -> None:
    runs = [
        {"concurrency": concurrency, "text": "code", "way": way, "gain": gain, "tokens_a_step": 1.5}
        for concurrency in (1, 32)
        for way, gain in (("ngram", 1.8), ("mtp", 0.9))
    ]
    head, *lines = speculation.gains(runs)
    assert head.split() == ["requests", "text", "ngram", "mtp"]
    assert [line.split() for line in lines] == [
        [str(concurrency), "code", "1.80", "(1.50)", "0.90", "(1.50)"] for concurrency in (1, 32)
    ]
