"""Laws of multi-token prediction: its guesses are the published formula's on any mesh, and they change no bit."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from moejax.config.config_values import ConfigError
from moejax.config.model_config import ModelConfig
from moejax.config.params import Params, without_mtp
from moejax.config.step_inputs import Bucket, StepInputs, layout
from moejax.model.mtp import following_tokens
from moejax.model.reference import draft_logits, hidden_states
from serving.engine.batch import StepBucket
from tests.support.decoder_models import CONFIGS, PAGES, tokens_of
from tests.support.models import lively_params
from tests.support.reference import drafts
from tests.support.stepping import Outcome, Stepper, work

NAMES = ("mixtral", "deepseek")
LONG = (pytest.param("mixtral", marks=pytest.mark.slow), "deepseek")
"""Grouped heads; and latent attention, with groups of experts and a shared one."""
BUCKET = StepBucket(4, 2)


def config(name: str) -> ModelConfig:
    return dataclasses.replace(CONFIGS[name], mtp=True)


@functools.cache
def params(name: str) -> Params:
    return lively_params(config(name), seed=3)


def stepper(name: str, ranks: int) -> Stepper:
    return Stepper(config(name), params(name), ranks, 8 // ranks, np.arange(8), drafts=3)


def drafted(out: Outcome, rank: int, segment: int) -> list[int]:
    assert out.drafts is not None
    return out.drafts[rank * BUCKET.segments + segment].tolist()


def likeliest(name: str, tokens: list[int], after: int) -> list[int]:
    """The three guesses after these tokens and the one after them, in float64."""
    return [int(np.argmax(row)) for row in drafts(params(name), config(name), tokens, after, 3)]


def generate(model: Stepper, rank: int, prompt: list[int], count: int) -> tuple[list[int], list[list[int]]]:
    """The tokens after a prompt, one by one, and the guesses after each."""
    last = BUCKET.decode + -(-len(prompt) // 32) - 1
    out = model.run(BUCKET, {rank: (work(prompt, 0, PAGES),)}, all_read=False)
    tokens, guesses = [model.segment(out, BUCKET, rank, last)[0]], [drafted(out, rank, last)]
    for at in range(len(prompt), len(prompt) + count - 1):
        out = model.run(BUCKET, {rank: (work([tokens[-1]], at, PAGES),)}, all_read=False)
        tokens.append(model.segment(out, BUCKET, rank, 0)[0])
        guesses.append(drafted(out, rank, 0))
    return tokens, guesses


@pytest.mark.parametrize("name", LONG)
def test_guesses_are_those_of_the_published_formula_on_any_number_of_ranks(name: str) -> None:
    prompt = tokens_of(61)
    tokens, guesses = generate(stepper(name, 2), 1, prompt, 5)  # over the end of a page
    for nth, found in enumerate(guesses):
        expected = likeliest(name, prompt + tokens[:nth], tokens[nth])
        assert found == (expected if nth else [expected[0], -1, -1])
    assert generate(stepper(name, 1), 0, prompt, 5) == (tokens, guesses)


@pytest.mark.parametrize("name", NAMES)
def test_guesses_after_rows_of_drafts_are_those_one_by_one(name: str) -> None:
    prompt, model = tokens_of(61), stepper(name, 2)
    tokens, guesses = generate(stepper(name, 2), 0, prompt, 6)
    model.run(BUCKET, {0: (work(prompt, 0, PAGES),)}, all_read=False)
    right = dataclasses.replace(work(tokens[:1], 61, PAGES), drafts=(tokens[1], tokens[2], 1))
    out = model.run(BUCKET, {0: (right,)}, all_read=False)
    assert [model.segment(out, BUCKET, 0, nth)[0] for nth in range(3)] == tokens[1:4]
    assert [drafted(out, 0, nth) for nth in range(3)] == guesses[1:4]
    # The draft after them was wrong, and left an entry that the next step writes again.
    out = model.run(BUCKET, {0: (work([tokens[3]], 64, PAGES),)}, all_read=False)
    assert drafted(out, 0, 0) == guesses[4]


@pytest.mark.parametrize("name", LONG)
def test_no_bit_of_the_model_changes_and_no_entry_is_not_a_number(name: str) -> None:
    plain = Stepper(CONFIGS[name], without_mtp(params(name)), 2, 4, np.arange(8))
    broken = dataclasses.replace(params(name), mtp=jax.tree.map(lambda a: a * np.nan, params(name).mtp))
    for values in (params(name), broken):
        model = Stepper(config(name), values, 2, 4, np.arange(8))
        for bucket, part, at in (
            (BUCKET, work(tokens_of(40), 0, PAGES), BUCKET.decode + 1),
            (StepBucket(2, 0), work([7], 40, PAGES), 0),
        ):
            one, other = (each.run(bucket, {1: (part,)}, all_read=False) for each in (plain, model))
            assert plain.segment(one, bucket, 1, at) == model.segment(other, bucket, 1, at)
            layers = CONFIGS[name].n_layers
            jax.tree.map(lambda a, b, n=layers: np.testing.assert_array_equal(a, b[:n]), one.new_kv, other.new_kv)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(other.new_kv))
            assert (other.drafts < CONFIGS[name].vocab_size).all()
            skipped = model.run(bucket, {1: (part,)}, all_read=False, skip_drafts=True)
            assert plain.segment(one, bucket, 1, at) == model.segment(skipped, bucket, 1, at)
            jax.tree.map(lambda a, b, n=layers: np.testing.assert_array_equal(a, b[:n]), one.new_kv, skipped.new_kv)
            assert not any(leaf[layers:].any() for leaf in jax.tree.leaves(skipped.new_kv)), "the layer's are zeros"
            assert skipped.expert_load.shape == other.expert_load.shape
        plain = Stepper(CONFIGS[name], without_mtp(params(name)), 2, 4, np.arange(8))


@pytest.mark.parametrize(("second", "after"), [(1, 34), (33, 0)], ids=["of the same request", "of another one"])
def test_a_row_is_followed_by_one_of_its_own_request_alone(second: int, after: int) -> None:
    """Two tiles whose positions follow each other; the second one's request begins in row `second`."""
    bucket = Bucket(decode=1, tiles=2, max_pages=1)
    inputs = StepInputs(**{name: np.zeros(shape, dtype) for name, (shape, dtype) in layout(bucket).items()})
    rows = np.arange(bucket.rows, dtype=np.int32)
    bases = np.array([0, 1, second], np.int32)
    inputs = dataclasses.replace(inputs, tokens=rows + 1, positions=rows - 1, new_base=bases)
    none = np.zeros(bucket.segments, np.int32)
    follow = np.asarray(following_tokens(inputs, none, none > 0, bucket.decode))
    assert follow.tolist() == [0, *range(3, 34), after, *range(35, 66), 0]


def test_the_layer_is_trained_as_it_is_served() -> None:
    tokens, name = tokens_of(20), "mixtral"
    hidden, _ = hidden_states(params(name), config(name), np.array([tokens[:-1]]))
    ours, _ = draft_logits(params(name), config(name), hidden, np.array([tokens[1:]]))
    np.testing.assert_allclose(
        ours[0, -1], drafts(params(name), config(name), tokens[:-1], tokens[-1], 1)[0], atol=3e-3
    )


def test_the_layer_has_a_place_for_its_experts_and_its_entries() -> None:
    cfg = config("shared")
    assert (cfg.n_layers, cfg.depth, cfg.n_moe_layers) == (7, 8, CONFIGS["shared"].n_moe_layers + 1)
    assert cfg.segments == (*CONFIGS["shared"].segments, (("moe",), 1))
    assert cfg.attention_layers == tuple(range(8))
    assert ModelConfig.from_json(cfg.to_json()) == cfg
    assert "mtp" not in CONFIGS["shared"].to_json()


def test_what_cannot_draft_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"tensor is 2, and the layer of .* not sharded yet.*--speculate ngram"):
        config("mixtral").tp_shard(2)
    with pytest.raises(ConfigError, match=r"mtp is true, but .* has state_layers"):
        config("qwen-next")
