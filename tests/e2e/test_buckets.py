"""Buckets chosen of what steps wanted: the next server has less padding, and the same tokens."""

import os
from pathlib import Path

import pytest

from serving.api.client import Client
from serving.config import Settings
from serving.core import bucket_counts
from serving.protocol.status import Status
from serving.server import Server
from tests.e2e.conftest import TINY

PROMPTS = ["ROMEO: a word", "JULIET: what light", "NURSE: " + "peace, good peace, " * 12]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with everything there is in the usual one but counts of steps."""
    usual = Path(os.environ.get("MOEJAX_CACHE") or Path.home() / ".cache" / "moejax")
    for name in ("downloads", "models", "executables", "kernels"):
        (usual / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(usual / name)
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path))
    return tmp_path


def padding(status: Status) -> float:
    return 1 - status.rows_filled / status.rows


def served() -> tuple[Status, list[tuple[int, ...]], str]:
    """A server's status at its end, the tokens of some requests, and what it said."""
    said: list[str] = []
    settings = {"model": str(TINY), "ranks": 1, "buckets": "auto", "restart": False}
    with Server(**settings, log=said.append) as server, Client(server) as client:
        answers = [
            client.generate(prompt, max_tokens=40, seed=seed, ignore_eos=True) for seed, prompt in enumerate(PROMPTS)
        ]
        return client.status(), [tuple(answer.token_ids) for answer in answers], " ".join(said)


def test_a_server_that_is_started_again_has_buckets_of_its_own_with_less_padding_and_the_same_tokens(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_counts, "MIN_STEPS", 50)
    before, tokens, said = served()
    assert before.buckets == Settings.buckets
    assert "others are chosen when 50 steps are counted, now 0" in said
    (book,) = (cache / "steps").iterdir()
    assert book.name.startswith("tiny-")
    after, again, said = served()
    assert "with the usual ones" in said
    assert after.buckets != Settings.buckets
    assert after.buckets[-1] == Settings.buckets[-1]
    assert padding(after) < padding(before) - 0.1
    assert again == tokens
    assert after.compiles_after_ready == 0
