"""Laws of how a step of attention ranks and expert ranks is cut."""

import numpy as np

from moejax.config.params import expert_positions
from moejax.config.step_inputs import Bucket
from moejax.model.stages import RolesShape, stages
from moejax.model.step_shape import StepShape
from tests.support.models import LEADING_DENSE, MIXTRAL, SHARDED, SHARED


def test_a_stage_ends_at_every_moe_layer() -> None:
    for cfg in (MIXTRAL, SHARED, LEADING_DENSE, SHARDED):
        found = stages(cfg)
        assert len(found) == cfg.n_moe_layers + 1
        assert sum(len(stage.layers) for stage, _ in found) == cfg.n_layers
        assert [stage.last for stage, _ in found].count(True) == 1
        assert len({stage for stage, _ in found}) <= 3 + len(expert_positions(cfg))


def test_micro_batches_have_every_row_and_segment_once() -> None:
    for decode, tiles in ((2, 0), (8, 2), (32, 0), (33, 3), (0, 1), (1, 1), (0, 5), (7, 8)):
        bucket = Bucket(decode=decode, tiles=tiles, max_pages=4)
        step = StepShape(cfg=MIXTRAL, bucket=bucket, ranks=4, slots=2, page_size=32)
        roles = RolesShape(step=step, attention=2)
        assert all(micro_batch.rows for micro_batch in roles.micro_batches)
        rows, segments = zip(
            *(roles.row_indices(micro_batch) for micro_batch in range(len(roles.micro_batches))), strict=True
        )
        assert sorted(np.concatenate(rows)) == list(range(bucket.rows))
        assert sorted(np.concatenate(segments)) == list(range(bucket.segments))
