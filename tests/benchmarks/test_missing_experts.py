"""Laws of the benchmark of missing experts: a model without experts is the model with them masked."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.missing_experts import Item, ResultsFile, accuracy, choose, judge, params_without_experts
from moejax.model.reference import logits
from tests.support.models import MIXTRAL, SHARED, random_params

TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12) * 3 % 96


@pytest.mark.parametrize("cfg", [MIXTRAL, SHARED], ids=lambda c: c.name)
@pytest.mark.parametrize("share", [Fraction(1, 4), Fraction(1, 2)], ids=str)
def test_a_model_without_experts_answers_as_the_model_with_them_masked(cfg, share):
    params = random_params(cfg)
    used = np.random.default_rng(0).integers(0, 99, (cfg.n_moe_layers, cfg.moe.experts))
    gone = choose("most used", share, used)
    less = logits(params_without_experts(params, cfg, gone), cfg, TOKENS)
    masked = logits(params, cfg, TOKENS, jnp.asarray(~gone))
    np.testing.assert_allclose(less, masked, atol=1e-5)
    assert np.abs(np.asarray(logits(params, cfg, TOKENS)) - masked).max() > 0.01


def test_the_share_is_taken_from_every_layer():
    used = np.array([[5, 1, 9, 2, 0, 3, 8, 4], [1, 2, 3, 4, 5, 6, 7, 8]])
    assert np.argwhere(choose("most used", Fraction(1, 4), used)).tolist() == [[0, 2], [0, 6], [1, 6], [1, 7]]
    assert np.argwhere(choose("every n-th", Fraction(1, 4), used)[0]).ravel().tolist() == [0, 4]
    with pytest.raises(SystemExit, match="a share of 1/16 of 8 experts is 1/2"):
        choose("every n-th", Fraction(1, 16), used)


def test_an_ending_is_right_by_sum_and_by_character_and_a_word_by_its_tokens():
    items = [Item("a", ("x", "yyyy"), 1), Item("a", ("x", "yyyy"), 0)]
    scores = [(-2.0, False, 1), (-4.0, False, 4)]
    answers = [judge(item, scores) for item in items]
    assert answers == [(False, True), (True, False)]
    assert accuracy(answers) == {"accuracy": 0.5, "accuracy_per_character": 0.5}
    assert accuracy(answers[:1]) == {"accuracy": 0.0, "accuracy_per_character": 1.0}
    words = [judge(Item("a", ("x",), 0), [(value, likeliest, 1)]) for value, likeliest in ((-9.0, True), (-1.0, False))]
    assert accuracy(words) == {"accuracy": 0.5}


def test_what_is_kept_is_not_asked_again_and_time_is_up_when_it_is_up(tmp_path):
    file = tmp_path / "kept.json"
    first = ResultsFile(file, "tiny", 2)
    row = first.row("most used", Fraction(1, 4), 0.4)
    row["answers"]["piqa"] += [(True, False), (False, False), (True, True)]
    assert first.write()
    again = ResultsFile(file, "tiny", 2, limit_s=0.0)
    row = again.row("most used", Fraction(1, 4), 0.4)
    assert row["answers"]["piqa"] == [[True, False], [False, False], [True, True]]
    assert row["tasks"] == {"piqa": {"accuracy": 0.5, "accuracy_per_character": 0.0}}
    assert again.row("most used", Fraction(1, 2), 0.8)["answers"]["piqa"] == []
    assert not again.write()
    with pytest.raises(SystemExit, match="is of model tiny, not of other"):
        ResultsFile(file, "other", 2)
