"""Laws of tensor groups: they compute the model, and no bit of a row depends on which ranks are in the group."""

import dataclasses

import jax
import numpy as np
import pytest

from moejax.config.config_values import ConfigError
from moejax.config.kv_cache import KVCache
from serving.engine.batch import StepBucket
from tests.support.decoder_models import CONFIGS, PAGES, TABLES, params, prefill, tokens_of
from tests.support.reference import forward
from tests.support.stepping import Stepper, work

NAMES = (pytest.param("mixtral", marks=pytest.mark.slow), "gpt-oss", "phi", "gemma4")
BIT_BY_BIT = (*NAMES[:-1], pytest.param("gemma4", marks=pytest.mark.slow))
"""Its heads of two sizes are those of `test_a_group_agrees_with_the_float64_reference`."""


def grouped(name: str, ranks: int, *groups: tuple[int, ...]) -> Stepper:
    table = np.array(TABLES[ranks])
    cfg = CONFIGS[name].tp_shard(len(groups[0]))
    return Stepper(cfg, params(name), ranks, len(table) // ranks, table, groups)


def generate(model: Stepper, rank: int, tokens: list[int], count: int, crowd: dict | None = None) -> list:
    """Tokens and log-probabilities of a request on a rank, its prompt in two steps; beside a prefill of others."""
    model.run(StepBucket(2, 2), {rank: (work(tokens[:40], 0, PAGES),), **(crowd or {})})
    out = model.run(StepBucket(2, 2), {rank: (work(tokens[40:], 40, PAGES),)})
    said, at = [model.segment(out, StepBucket(2, 2), rank, 2)], len(tokens)
    for _ in range(count):
        out = model.run(StepBucket(2, 0), {rank: (work([said[-1][0]], at, PAGES),)})
        said.append(model.segment(out, StepBucket(2, 0), rank, 0))
        at += 1
    return said


def generate_with_drafts(model: Stepper, rank: int, tokens: list[int], said: list) -> list:
    """As `generate`, whose tokens are the drafts, every other one wrong."""
    model.run(StepBucket(2, 2), {rank: (work(tokens[:40], 0, PAGES),)})
    out = model.run(StepBucket(2, 2), {rank: (work(tokens[40:], 40, PAGES),)})
    made, at = [model.segment(out, StepBucket(2, 2), rank, 2)], len(tokens)
    while len(made) < len(said):
        guess = said[len(made)][0] if len(made) % 3 else said[len(made)][0] ^ 1
        item = dataclasses.replace(work([made[-1][0]], at, PAGES), drafts=(guess,))
        out = model.run(StepBucket(2, 0), {rank: (item,)})
        made.append(model.segment(out, StepBucket(2, 0), rank, 0))
        if made[-1][0] == guess:
            made.append(model.segment(out, StepBucket(2, 0), rank, 1))
        at = len(tokens) + len(made) - 1
    return made[: len(said)]


@pytest.mark.parametrize("name", NAMES)
def test_a_group_agrees_with_the_float64_reference(name: str) -> None:
    tokens = tokens_of(41)
    logits = forward(params(name), CONFIGS[name], tokens)[-1]
    model = grouped(name, 4, (0, 1), (2, 3))
    for rank in range(4):
        _, (token, logprob) = prefill(model, tokens, rank, StepBucket(2, 2))
        assert token == int(np.argmax(logits))
        expected = logits[token] - np.logaddexp.reduce(logits)
        assert abs(logprob - expected) < 1e-4 * np.abs(logits).max()


@pytest.mark.parametrize("name", BIT_BY_BIT)
def test_no_bit_depends_on_who_is_in_the_group_or_on_its_other_requests(name: str) -> None:
    tokens, other = tokens_of(60), tokens_of(50, seed=1)
    alone = generate(grouped(name, 2, (0, 1)), 0, tokens, 6)
    for model, rank in (
        (grouped(name, 2, (1, 0)), 0),
        (grouped(name, 3, (2, 0)), 2),  # rank 1 is in no group
        (grouped(name, 4, (0, 3), (2, 1)), 1),
    ):
        others = {each for group in model.groups for each in group} - {rank}
        crowd = {each: (work(other, 0, PAGES),) for each in others}
        assert generate(model, rank, tokens, 6, crowd) == alone
    assert generate_with_drafts(grouped(name, 2, (0, 1)), 0, tokens, alone) == alone


def test_a_rank_keeps_its_heads_of_every_member_and_as_much_of_the_cache_as_alone() -> None:
    whole, model = (
        Stepper(CONFIGS["mixtral"], params("mixtral"), 2, 5, np.array(TABLES[2])),
        grouped("mixtral", 2, (0, 1)),
    )
    assert [a.nbytes for a in jax.tree.leaves(model.cache)] == [a.nbytes for a in jax.tree.leaves(whole.cache)]
    for each in (whole, model):
        each.run(StepBucket(2, 2), {rank: (work(tokens_of(40, seed=rank), 0, PAGES),) for rank in (0, 1)})
    kept = np.asarray(whole.cache.k).reshape(3, 2, 512, 2, 16)  # layers, ranks, entries, heads, head size
    shared = np.asarray(model.cache.k).reshape(3, 2, 2, 512, 16)  # layers, ranks, members, entries, head size
    for head in (0, 1):
        np.testing.assert_allclose(shared[:, head], kept[:, :, :, head], atol=1e-3)


@pytest.mark.parametrize(("name", "tensor"), [("deepseek", 2), ("qwen", 2), ("shared", 2), ("mixtral", 4)])
def test_a_model_whose_heads_cannot_be_sharded_is_refused(name: str, tensor: int) -> None:
    with pytest.raises(ConfigError, match=f"over {tensor} ranks|tensor is {tensor}"):
        CONFIGS[name].tp_shard(tensor)


def test_a_non_finite_row_is_reported_by_its_own_rank_alone() -> None:
    model, tokens = grouped("mixtral", 2, (0, 1)), tokens_of(60)
    model.run(StepBucket(2, 2), {0: (work(tokens[:32], 0, PAGES),), 1: (work(tokens[:32], 0, PAGES),)})
    spoilt = np.array(model.cache.v)
    spoilt[:, model.entries + PAGES[0] * 32] = np.nan  # rank 1's share of the first entry of the request on rank 0
    model.cache = jax.device_put(KVCache(model.cache.k, spoilt), model.cache.k.sharding)
    bucket = StepBucket(2, 2)
    works = {rank: (work(tokens[32:], 32, PAGES, samples=False),) for rank in (0, 1)}
    out = model.run(bucket, works, all_read=False)
    finite = np.isfinite(out.hidden).all(-1).reshape(2, -1)
    assert not finite[0, bucket.decode : bucket.decode + 28].any()
    assert finite[1].all()
