"""Attention ranks and expert ranks make, in every bit, what collocated ranks make."""

import dataclasses

import numpy as np
import pytest

from moejax.config import ModelConfig
from moejax.disaggregated import RolesShape, stretches
from moejax.inputs import Bucket
from moejax.model import StepShape
from moejax.programs import expert_positions
from serving.batch import Bucket as Shape
from tests.moejax.models import MIXTRAL, SHARED, lively_params
from tests.moejax.roles import RoleStepper
from tests.moejax.stepping import Stepper, work

DIVIDED = dataclasses.replace(SHARED, name="divided", divide_dense=True)
LEADING_DENSE = dataclasses.replace(MIXTRAL, name="leading-dense", n_layers=4, dense_layers=(0,))


def ids(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, 96, count).tolist()


@pytest.mark.parametrize(
    ("cfg", "attention", "experts"),
    [(SHARED, 2, 2), (LEADING_DENSE, 1, 3), (DIVIDED, 1, 2)],
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
    ]
    for bucket, parts in steps:
        made, wanted = (each.run(bucket, parts, all_read=all_read) for each in (apart, together))
        for rank in parts:
            rows = slice(rank * bucket.rows, (rank + 1) * bucket.rows)
            np.testing.assert_array_equal(np.asarray(made[rank].hidden), wanted.hidden[rows])
            np.testing.assert_array_equal(np.asarray(made[rank].new_kv.k), wanted.new_kv.k[:, rows])
            np.testing.assert_array_equal(np.asarray(made[rank].new_kv.v), wanted.new_kv.v[:, rows])
        total = sum(np.asarray(each.expert_load) for each in made)
        np.testing.assert_array_equal(total, wanted.expert_load.reshape(attention, -1, count).sum(0))


def test_a_stretch_ends_at_every_moe_layer() -> None:
    for cfg in (MIXTRAL, SHARED, LEADING_DENSE, DIVIDED):
        found = stretches(cfg)
        assert len(found) == cfg.n_moe_layers + 1
        assert sum(len(stretch.layers) for stretch, _ in found) == cfg.n_layers
        assert [stretch.last for stretch, _ in found].count(True) == 1
        assert len({stretch for stretch, _ in found}) <= 3 + len(expert_positions(cfg))


def test_micro_batches_have_every_row_and_segment_once() -> None:
    for decode, tiles in ((2, 0), (8, 2), (32, 0), (33, 3), (0, 1), (1, 1), (0, 5), (7, 8)):
        bucket = Bucket(decode=decode, tiles=tiles, max_pages=4)
        step = StepShape(cfg=MIXTRAL, bucket=bucket, ranks=4, slots=2, page_size=32)
        roles = RolesShape(step=step, attention=2)
        assert all(micro.rows for micro in roles.micros)
        rows, segments = zip(*(roles.places(micro) for micro in range(len(roles.micros))), strict=True)
        assert sorted(np.concatenate(rows)) == list(range(bucket.rows))
        assert sorted(np.concatenate(segments)) == list(range(bucket.segments))
