"""Laws of a rank's slots: they hold the experts asked for, however they came there, and nothing else moved."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from moejax.checkpoint.checkpoint import load_params
from moejax.checkpoint.convert import convert
from moejax.checkpoint.host_store import HostStore, StoreError
from moejax.checkpoint.published_store import open_store, record_checksums, recorded_form
from moejax.checkpoint.safetensors import SafetensorsFolder
from moejax.config.model_config import ModelConfig
from moejax.config.parameter_counts import expert_bytes
from moejax.config.params import Params, expert_positions, replace_experts
from moejax.config.step_inputs import Bucket
from moejax.config.weight_formats import weight_bytes
from moejax.model.tensor_parallel import tp_shard_of
from moejax.runtime import live_weights, steps
from moejax.runtime.live_weights import LiveArrays
from moejax.runtime.programs import ModelShape
from serving.engine.batch import ScheduledRequest, StepBucket
from serving.protocol.sampling import ResolvedSampling
from tests.support.models import HYBRID, MIXTRAL, SHARED, model_folder
from tests.support.quantized_folders import quantized_folders
from tests.support.stepping import Stepper

SLOTS = 3
EIGHT_BIT = ("fp8-block", "fp8-tensor", "fp8-channel", "fp8-exponents", "int8")
"""Published forms of eight bits."""
NATS = 1e-3
"""Between what a rank computes of weights in a published form and the reference of the numbers they stand for."""


@pytest.fixture(scope="module", params=[MIXTRAL, SHARED], ids=lambda c: c.name)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    params = model_folder(folder / "m", request.param)
    shape = ModelShape(cfg=request.param, buckets=(Bucket(decode=2, tiles=0, max_pages=2),), page_size=8, pages=2)
    programs = SimpleNamespace(fills=dict.fromkeys(expert_positions(request.param), steps.run_fill))
    return folder / "m", params, shape, programs


def assert_holds(arrays: LiveArrays, params, slots: np.ndarray) -> None:
    cfg = arrays.shape.cfg
    np.testing.assert_array_equal(arrays.slot_experts, slots)
    (place,) = [(i, j) for i, (kinds, _) in enumerate(cfg.segments) for j, kind in enumerate(kinds) if kind == "moe"]
    experts = params.segments[place[0]][place[1]].moe.experts
    for layer, row in enumerate(slots):
        for slot, expert in enumerate(row):
            held = arrays.expert(layer, slot)
            np.testing.assert_array_equal(held.gate_up, experts.gate_up[layer, expert] if expert >= 0 else 0)
            np.testing.assert_array_equal(held.down, experts.down[layer, expert] if expert >= 0 else 0)


def some_slots(cfg, seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    rows = [draw.permutation(np.arange(-1, cfg.moe.experts))[:SLOTS] for _ in range(cfg.n_moe_layers)]
    return np.array(rows, np.int32)


@pytest.mark.parametrize("attends", [True, False])
def test_a_new_generation_finds_the_slots_as_they_were(model, attends):
    folder, params, shape, programs = model
    device, slots = jax.devices()[0], some_slots(shape.cfg, 0)
    arrays = LiveArrays(shape, HostStore.open(folder), attends=attends)
    arrays.enter_device(device)
    arrays.fill(slots, programs, device)
    for _ in range(2):  # the first time, entering may have failed half-way
        arrays.leave_device(0)
    arrays.enter_device(device)
    assert (arrays.cache is not None) == attends
    assert_holds(arrays, params, slots)


def test_a_new_generation_finds_the_pages_in_use_and_all_states(tmp_path):
    model_folder(tmp_path / "m", HYBRID)
    buckets = (Bucket(decode=2, tiles=0, max_pages=2, states=True),)
    shape = ModelShape(cfg=HYBRID, buckets=buckets, page_size=8, pages=3)
    arrays, device = LiveArrays(shape, HostStore.open(tmp_path / "m")), jax.devices()[0]
    arrays.enter_device(device)
    draw = np.random.default_rng(0)
    before = jax.tree.map(lambda a: draw.normal(size=a.shape).astype(np.float32), arrays.cache)
    assert before.states.matrix.shape[1] == shape.states == 6
    arrays.cache = jax.device_put(before, device)
    arrays.leave_device(2)
    arrays.enter_device(device)
    jax.tree.map(np.testing.assert_array_equal, arrays.cache.states, before.states)
    np.testing.assert_array_equal(arrays.cache.k[:, :16], before.k[:, :16])
    assert not np.asarray(arrays.cache.k)[:, 16:].any()


@pytest.mark.parametrize("batch", [1, 2, 1000])
def test_slots_hold_the_experts_asked_for_in_batches_of_any_size(model, monkeypatch, batch):
    folder, params, shape, programs = model
    monkeypatch.setattr(live_weights, "BATCH_BYTES", batch * expert_bytes(shape.cfg))
    device = jax.devices()[0]
    arrays = LiveArrays(shape, HostStore.open(folder))
    arrays.enter_device(device)
    first, second = some_slots(shape.cfg, 0), some_slots(shape.cfg, 1)
    assert arrays.fill(first, programs, device).read == (first >= 0).sum()
    assert_holds(arrays, params, first)
    moved = (second != first) & (second >= 0)
    assert arrays.fill(second, programs, device).read == moved.sum()
    assert_holds(
        arrays, params, np.where(second >= 0, second, arrays.slot_experts)
    )  # a slot to be empty may keep what it had


def test_programs_and_host_buffers_come_to_the_same(model):
    folder, params, shape, programs = model
    device = jax.devices()[0]
    slots = some_slots(shape.cfg, 2)
    for local in (programs, None):
        arrays = LiveArrays(shape, HostStore.open(folder))
        arrays.enter_device(device)
        arrays.fill(slots, local, device)
        assert_holds(arrays, params, slots)


def test_more_slots_keep_what_is_held(model):
    folder, params, shape, programs = model
    device = jax.devices()[0]
    arrays = LiveArrays(shape, HostStore.open(folder))
    arrays.enter_device(device)
    few = some_slots(shape.cfg, 3)[:, : SLOTS - 1]
    arrays.fill(few, None, device)
    more = np.concatenate([few, np.full((len(few), 1), -1, np.int32)], axis=1)
    assert arrays.fill(more, programs, device).read == 0
    assert_holds(arrays, params, more)


def test_a_rank_takes_another_share_of_the_heads_and_notices_damage_in_it(model):
    folder, params, shape, _ = model
    if shape.cfg.n_kv_heads % 2:
        pytest.skip("its heads cannot be sharded over two ranks")
    cfg, device = shape.cfg.tp_shard(2), jax.devices()[0]
    arrays = LiveArrays(dataclasses.replace(shape, cfg=cfg), HostStore.open(folder))
    arrays.enter_device(device)
    for shard in (1, 0):
        cache = arrays.cache
        arrays.attend(True, device, shard)
        assert arrays.cache is not cache, "keys and values of other heads are of no use"
        expected = tp_shard_of(params, shard, cfg).segments[0][0]
        held = arrays._weights.segments[0][0]
        np.testing.assert_array_equal(held.qkv, expected.qkv)
        np.testing.assert_array_equal(held.out, expected.out)
        assert arrays.damaged() == []
    cache = arrays.cache
    arrays.attend(True, device, 0)
    assert arrays.cache is cache, "who keeps its share keeps its cache"
    np.asarray(arrays._host_weights.segments[0][0].out)[0, 0, 0] += 1.0
    assert arrays.damaged() == ["segments.0.0.out"]


def test_a_share_that_cannot_be_read_leaves_all_as_it_was(model, monkeypatch):
    folder, _, shape, _ = model
    if shape.cfg.n_kv_heads % 2:
        pytest.skip("its heads cannot be sharded over two ranks")
    device, store = jax.devices()[0], HostStore.open(folder)
    arrays = LiveArrays(dataclasses.replace(shape, cfg=shape.cfg.tp_shard(2)), store)
    arrays.enter_device(device)
    before = arrays._weights, arrays.cache

    def unreadable(_self):
        raise StoreError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(HostStore, "non_expert_params", unreadable)
        with pytest.raises(StoreError, match="the disk is gone"):
            arrays.attend(True, device, 1)
    assert (arrays._weights, arrays.cache, arrays.shard) == (*before, 0)
    arrays.attend(True, device, 1)
    assert arrays.shard == 1
    assert arrays.cache is not before[1]


@pytest.fixture(scope="module")
def other(model, tmp_path_factory):
    """Other weights of the same model."""
    folder = tmp_path_factory.mktemp("other") / "m"
    return folder, model_folder(folder, model[2].cfg, seed=9)


@pytest.mark.parametrize("attends", [True, False])
def test_staged_weights_are_used_once_they_are_switched_to_and_not_before(model, other, attends):
    folder, params, shape, programs = model
    device, slots = jax.devices()[0], some_slots(shape.cfg, 0)
    arrays = LiveArrays(shape, HostStore.open(folder), attends=attends)
    arrays.enter_device(device)
    arrays.fill(slots, programs, device)
    staged = arrays.stage(HostStore.open(other[0]))
    assert_holds(arrays, params, slots)
    assert arrays.damaged() == []
    later = some_slots(shape.cfg, 1)  # a plan that was adopted after the staging
    arrays.fill(later, programs, device)
    arrays.switch(staged, device)
    assert_holds(arrays, other[1], slots)
    assert arrays.damaged() == []
    assert all(arrays.is_intact(layer, slot) for layer, slot in np.argwhere(slots >= 0).tolist())
    arrays.fill(later, programs, device)
    assert_holds(arrays, other[1], np.where(later >= 0, later, slots))
    assert (arrays.weights is not None) == attends


def test_weights_that_cannot_be_read_are_not_staged_and_change_nothing(model):
    folder, params, shape, programs = model
    device, slots = jax.devices()[0], some_slots(shape.cfg, 0)
    arrays = LiveArrays(shape, HostStore.open(folder))
    arrays.enter_device(device)
    arrays.fill(slots, programs, device)

    class Unreadable(HostStore):
        def read_experts(self, wanted, dtype=np.float32):
            raise StoreError("the store is gone")

    with pytest.raises(StoreError, match="the store is gone"):
        arrays.stage(Unreadable.open(folder))
    assert_holds(arrays, params, slots)


@pytest.mark.parametrize("form", EIGHT_BIT)
def test_a_rank_holds_the_bytes_of_the_files_and_computes_with_the_numbers_they_stand_for(tmp_path, form):
    sizes = {"hidden_size": 128, "intermediate_size": 192}
    plain = quantized_folders(tmp_path / "hf", form, wide=np.float32, sizes=sizes)
    record_checksums(tmp_path / "hf", tmp_path / "noted", name="m", on_progress=lambda *_: None)
    form_held = recorded_form(tmp_path / "noted")
    cfg = ModelConfig.load(tmp_path / "noted").with_packed(form_held)
    arrays = LiveArrays(
        ModelShape(cfg=cfg, buckets=(), page_size=8, pages=2), open_store(tmp_path / "noted", held=form_held)
    )
    device, experts = jax.devices()[0], cfg.moe.experts
    arrays.enter_device(device)
    arrays.fill(np.tile(np.arange(experts, dtype=np.int32), (cfg.n_moe_layers, 1)), None, device)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((arrays.weights, arrays.experts)))
    assert 1 <= held / SafetensorsFolder.open(tmp_path / "hf").bytes <= 1.05
    assert held == weight_bytes(cfg, experts=True) + weight_bytes(cfg, experts=False)
    params = replace_experts(arrays.weights, lambda position, _: arrays.experts[position])
    convert(plain, tmp_path / "plain", name="m", on_progress=lambda *_: None)
    wide = load_params(tmp_path / "plain")
    bucket, rows = StepBucket(2, 1), 20
    one = ScheduledRequest(
        request_id="a",
        start=0,
        tokens=tuple(range(3, 3 + rows)),
        pages=(0,),
        samples=True,
        sampling=ResolvedSampling(max_tokens=1, seed=0, temperature=0.0),
    )

    def scores(cfg: ModelConfig, params: Params) -> np.ndarray:
        stepper = Stepper(cfg, jax.tree.map(np.asarray, params), 1, experts, np.arange(experts))
        logits = stepper.logits(stepper.run(bucket, {0: (one,)}), bucket, 0, bucket.decode, rows)
        return np.asarray(jax.nn.log_softmax(logits.astype(np.float32)))

    reference = scores(dataclasses.replace(cfg, weights="float32", packed=None), wide)
    found = scores(cfg, params)
    assert np.abs(found - reference).max() < NATS
    assert np.ptp(reference) > 100 * NATS
