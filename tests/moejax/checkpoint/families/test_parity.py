"""Law: every published family is transformers' own model, tensor names, prefill and greedy decoding included."""

import importlib.util

import pytest

from moejax.checkpoint.families import SERVED_FAMILIES
from tests.parity.programs import compare
from tests.parity.records import KILLED, PAGE, PROGRAMS, SERVER, load, page
from tests.support.families import answers
from tests.support.families.published import ALL, CASES, ODD

MISSING = [name for name in ("torch", "transformers", "safetensors") if importlib.util.find_spec(name) is None]
ONE_OF_EACH = ("mixtral, window", "llama 3.1", "qwen3", "qwen2-moe", "qwen3-moe", "olmoe", "deepseek-v2")
ONE_OF_EACH += ("deepseek-v3", "gpt-oss", "glm-4-moe", "granite-moe", "phi-3.5-moe, long")
compared = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed: pip install -e '.[parity]'")


@compared
@pytest.mark.parametrize(
    "name", [name if name in ONE_OF_EACH else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_published_folder_gives_the_logits_and_tokens_of_transformers(name):
    found = compare(CASES[name], seed=11, ranks=1)
    assert found.holds, found


@compared
@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3-moe", "deepseek-v3", "gpt-oss"])
def test_four_ranks_give_them_too(name):
    found = compare(CASES[name], seed=12, ranks=4)
    assert found.holds, found


@compared
@pytest.mark.parametrize("name", ALL)
def test_the_answers_recorded_for_tests_without_torch_are_those_of_transformers(name):
    found = answers.ask(name)
    assert found.tokens == answers.recorded(name).tokens
    assert found.margin > 3e-5, "a sum in another order must not change a token"


def test_every_family_has_a_case():
    assert {case.family for case in CASES.values()} == set(SERVED_FAMILIES)


def test_the_page_of_results_is_what_the_records_say_and_they_are_of_every_family():
    records = load()
    assert PAGE.read_text() == page()
    assert all(record.found.holds for record in records.values())
    compared = {(r.model, r.way, r.ranks, r.seed) for r in records.values()}
    assert compared >= {(name, PROGRAMS, ranks, seed) for name in CASES for ranks in (1, 4) for seed in range(3)}
    assert compared >= {(name, PROGRAMS, 3, 0) for name in ODD}
    killed = ("qwen3-moe", "deepseek-v3", "gpt-oss")
    assert compared >= {(name, way, 4, 0) for name in killed for way in (SERVER, KILLED)}
