"""Attention ranks and expert ranks make, in every bit, what collocated ranks make."""

import dataclasses

import jax
import numpy as np
import pytest

from moejax.config.attention_config import WindowedConfig
from moejax.config.model_config import ModelConfig
from serving.engine.batch import StepBucket as Shape
from tests.support.decoder_models import CONFIGS
from tests.support.models import LEADING_DENSE, SHARDED, SHARED, lively_params
from tests.support.roles import RoleStepper
from tests.support.stepping import Stepper, work

WINDOWED = dataclasses.replace(
    LEADING_DENSE,
    name="windowed",
    window=20,
    full_layers=(1, 3),
    windowed=WindowedConfig(n_heads=6, n_kv_heads=3, d_head=24, sinks=True),
    expert_limits=(0.0, 0.0, 0.3, 0.3),
    dense_limits=(0.5, 0.0, 0.0, 0.4),
)


def ids(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, 96, count).tolist()


@pytest.mark.parametrize(
    ("cfg", "attention", "experts"),
    [(SHARED, 2, 2), (dataclasses.replace(LEADING_DENSE, cache_format="int8"), 1, 3), (SHARDED, 1, 2)],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.parametrize("all_read", [True, False])
def test_roles_make_what_collocated_ranks_make(cfg: ModelConfig, attention: int, experts: int, all_read: bool) -> None:
    count = cfg.moe.experts
    slots = -(-count // experts) + 1
    table = np.resize(np.arange(count), experts * slots)
    params = lively_params(cfg)
    apart = RoleStepper(cfg, params, attention, slots, table)
    together = Stepper(cfg, params, attention, count, np.tile(np.arange(count), attention))
    pages = {rank: tuple(range(1, 4)) for rank in range(attention)}
    prompts = {rank: ids(70, rank) for rank in range(attention)}
    steps = [
        (Shape(3, 4), {rank: (work(prompts[rank][:67], 0, pages[rank]),) for rank in pages}),
        (Shape(2, 0), {0: (work(prompts[0][67:68], 67, pages[0]),)}),
        # Rows of drafts, in both micro-batches.
        (Shape(3, 4), {0: (dataclasses.replace(work(prompts[0][68:69], 68, pages[0]), drafts=(5, 6)),)}),
    ]
    for bucket, parts in steps:
        made, wanted = (each.run(bucket, parts, all_read=all_read) for each in (apart, together))
        for rank in parts:
            rows = slice(rank * bucket.rows, (rank + 1) * bucket.rows)
            np.testing.assert_array_equal(np.asarray(made[rank].hidden), wanted.hidden[rows])
            new, whole = ((each.k, each.v) for each in (made[rank].new_kv, wanted.new_kv))
            for mine, all_rows in zip(*map(jax.tree.leaves, (new, whole)), strict=True):
                np.testing.assert_array_equal(np.asarray(mine), all_rows[:, rows])
        total = sum(np.asarray(each.expert_load) for each in made)
        np.testing.assert_array_equal(total, wanted.expert_load.reshape(attention, -1, count).sum(0))


@pytest.mark.parametrize("name", ["gemma4", pytest.param("gpt-oss", marks=pytest.mark.slow)])
def test_stages_round_as_whole_steps_do(name: str) -> None:
    """Where norms and layers scale (gemma4), and in a micro-batch with one segment that decodes: that of the last
    draft."""
    cfg, pages, prompt = CONFIGS[name], (1, 2, 3), ids(70, 0)
    count = cfg.moe.experts
    params, table = lively_params(cfg), np.resize(np.arange(count), count + 2)
    apart, together = RoleStepper(cfg, params, 1, count + 2, table), Stepper(cfg, params, 1, count, np.arange(count))
    drafted = dataclasses.replace(work(prompt[68:69], 68, pages), drafts=(5, 6))
    for bucket, item in (
        (Shape(3, 4), work(prompt[:67], 0, pages)),
        (Shape(2, 0), work(prompt[67:68], 67, pages)),
        (Shape(3, 4), drafted),
    ):
        made, wanted = (each.run(bucket, {0: (item,)}) for each in (apart, together))
        np.testing.assert_array_equal(np.asarray(made[0].hidden), wanted.hidden)
