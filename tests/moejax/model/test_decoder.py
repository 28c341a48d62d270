"""Laws of the step of models whose layers see all positions; the others are held in the files beside this one."""

import dataclasses

import jax
import numpy as np
import pytest

from serving.engine.batch import StepBucket
from tests.support.decoder_models import BUCKET, CONFIGS, PAGES, PLAIN, params, prefill, stepper, tokens_of
from tests.support.reference import forward
from tests.support.step_laws import (
    check_agrees,
    check_bits,
    check_drafts,
    check_narrow_is_close,
    check_twice,
    check_unread,
)
from tests.support.stepping import Stepper, work

SLOW = ("shared", "phi", "qwen")
"""Models whose rows `scripts/soak` alone compares bit by bit; the others are one of each kind of attention, experts and
placement."""
BIT_BY_BIT = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in PLAIN]
NARROW = (("mixtral", "int8"),)
"""Caches narrower than float32: read by the kernel and by the reference."""


@pytest.mark.parametrize(("name", "ranks"), [*(("mixtral", n) for n in (1, 2, 3)), *((x, 4) for x in PLAIN)])
def test_a_step_agrees_with_the_float64_reference_on_any_number_of_ranks(name: str, ranks: int) -> None:
    check_agrees(name, ranks)


@pytest.mark.parametrize(("name", "form"), NARROW)
def test_a_step_over_a_narrow_cache_is_close_to_the_float64_reference(name: str, form: str) -> None:
    check_narrow_is_close(name, form)


@pytest.mark.parametrize("name", BIT_BY_BIT)
def test_no_bit_depends_on_ranks_buckets_neighbours_or_on_what_was_cached(name: str) -> None:
    check_bits(name)


@pytest.mark.parametrize(("name", "form"), NARROW)
def test_no_bit_of_a_narrow_cache_depends_on_them(name: str, form: str) -> None:
    check_bits(name, form)


@pytest.mark.parametrize("name", BIT_BY_BIT)
def test_rows_of_drafts_are_those_of_the_tokens_one_by_one_whatever_the_drafts_after_them(name: str) -> None:
    check_drafts(name)


@pytest.mark.parametrize("name", PLAIN)
def test_a_step_made_twice_leaves_the_cache_as_once(name: str) -> None:
    check_twice(name)


@pytest.mark.parametrize(("name", "ranks"), [*((x, 4) for x in PLAIN), ("mixtral", 1)])
def test_rows_that_nobody_reads_end_at_their_keys_and_values_and_change_no_bit(name: str, ranks: int) -> None:
    check_unread(name, ranks)


def test_masked_experts_hand_their_tokens_to_the_next_best() -> None:
    cfg, tokens = CONFIGS["shared"], tokens_of(40)
    table = np.array([0, 1, 2, 3, 4, 5, -1, 6])
    masked = Stepper(cfg, params("shared"), 2, 4, table)
    logits = forward(params("shared"), cfg, tokens, masked={7})[-1]
    _, (token, logprob) = prefill(masked, tokens, 0, BUCKET)
    assert token == int(np.argmax(logits))
    assert abs(logprob - (logits[token] - np.logaddexp.reduce(logits))) < 1e-4 * np.abs(logits).max()


def test_every_row_counts_once_for_each_expert_it_went_to() -> None:
    model = stepper("shared", 4)
    bucket = BUCKET
    out = model.run(bucket, {2: (work(tokens_of(41), 0, PAGES),)})
    load = np.asarray(out.expert_load).reshape(4, 2, 8)
    assert load.sum((1, 2)).tolist() == [0, 0, 41 * 6 * 2, 0]


@pytest.mark.parametrize("spoilt", ["embed", "qkv"])
def test_an_unread_row_with_non_finite_keys_and_values_is_tagged(spoilt: str) -> None:
    broken = jax.tree.map(np.copy, params("mixtral"))
    if spoilt == "embed":
        broken.embed[5] = np.nan
    else:
        broken.segments[0][0].qkv[-1, -1] = np.nan
    model = dataclasses.replace(stepper("mixtral", 1), params=broken)
    chunk = work([3, 5, 4, *tokens_of(29)], 0, (0, 1), samples=False)
    out = model.run(StepBucket(2, 1), {0: (chunk,)}, all_read=False)
    told = ~np.isfinite(out.hidden).all(-1)
    assert told[3]
    assert told[2:].all() == (spoilt == "qkv")
    assert not told[:2].any()
    made = np.concatenate([out.new_kv.k, out.new_kv.v], axis=-1)
    assert not np.isfinite(made).all((0, 2))[told].any()
