"""A rank's command handlers in this process, on its first device, without a front or other ranks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import pytest

from moejax.checkpoint.host_store import HostStore
from moejax.config.kv_cache import KVCache
from moejax.config.model_config import ModelConfig
from moejax.config.params import expert_positions
from moejax.config.step_inputs import Bucket, idle_inputs, unpack
from moejax.runtime import steps
from moejax.runtime.executables import ExecutableStore
from moejax.runtime.expert_parity import HostExpertBuffer
from moejax.runtime.kv_transfer import EntryWriter
from moejax.runtime.live_weights import LiveArrays
from moejax.runtime.programs import LocalPrograms, ModelShape
from serving.launch.rank_channel import RankChannel
from serving.worker.rank import RankWorker
from serving.worker.state import ConfiguredModel, WorkerState
from tests.support.models import MIXTRAL

BUCKETS = (Bucket(decode=4, tiles=0, max_pages=4), Bucket(decode=2, tiles=1, max_pages=4))
PAGE, PAGES, SLOTS = 8, 12, 3


class OwnPrograms:
    """The programs that a rank runs on its own device, compiled at their first use. The tokens that `sample` chooses
    follow the tokens in the rows of the fake step."""

    fills = dict.fromkeys(expert_positions(MIXTRAL), steps.run_fill)

    def after_step(self, bucket: int) -> tuple[Any, Any]:
        """Sample and commit programs of a bucket."""

        def sample(_head: Any, hidden: jax.Array, packed: jax.Array) -> tuple[jax.Array, jax.Array]:
            inputs = unpack(packed, BUCKETS[bucket])
            chosen = hidden[inputs.sample_row, 0].astype("int32") + 1
            return chosen, chosen.astype("float32")

        def commit(cache: KVCache, new: KVCache, packed: jax.Array) -> KVCache:
            return steps.run_commit(cache, new, packed, bucket=BUCKETS[bucket])

        return sample, commit


def make_worker(monkeypatch: pytest.MonkeyPatch, folder: Path, rank: int = 0, cfg: ModelConfig = MIXTRAL) -> RankWorker:
    """A rank that has the model in `folder` (`tests.support.models.model_folder` of MIXTRAL), an empty cache, and the
    programs for SLOTS slots. `cfg` is MIXTRAL, with a cache of any format."""
    device = jax.devices()[0]
    monkeypatch.setattr(WorkerState, "device", device)
    worker = RankWorker(rank, RankChannel(front="127.0.0.1:1", address="127.0.0.1"))
    shape = ModelShape(cfg=cfg, buckets=BUCKETS, page_size=PAGE, pages=PAGES)
    arrays = LiveArrays(shape, HostStore.open(folder))
    arrays.enter_device(device)
    worker.state.configured = ConfiguredModel(
        shape=shape,
        executables=ExecutableStore(folder / "executables"),
        arrays=arrays,
        expert_buffer=HostExpertBuffer(arrays),
        entry_writer=EntryWriter(cfg, BUCKETS),
        idle_inputs=tuple(idle_inputs(bucket) for bucket in BUCKETS),
        collective_timeout_s=1,
    )
    worker.state.world = cast(Any, SimpleNamespace(use=lambda ranks: None, devices=lambda ranks: [device]))
    worker.meshes._local[SLOTS] = cast(LocalPrograms, OwnPrograms())
    return worker
