"""Laws of a rank's part in parity: an expert made again of the others has its bits, in every form that ranks hold
weights in, and nothing else is put into a slot."""

import dataclasses
import functools
import shutil

import jax
import numpy as np
import pytest

from moejax.checkpoint.published_store import open_store, record_checksums, recorded_form
from moejax.config.model_config import PACKED_FORMATS, ModelConfig
from moejax.config.step_inputs import Bucket
from moejax.runtime.expert_parity import HostExpertBuffer, ParityError, WeightsKey
from moejax.runtime.live_weights import LiveArrays
from moejax.runtime.programs import ModelShape
from tests.support.models import MIXTRAL, SHARED, model_folder
from tests.support.quantized_folders import quantized_folders

CASES = [(MIXTRAL, "float32"), (SHARED, "float32"), (MIXTRAL, "bfloat16"), (MIXTRAL, "int8"), (MIXTRAL, "int4")]
PACKED = ["awq", "nvfp4", "mxfp4", "fp8-block", "int8"]


def quiet(done: int, total: int) -> None:
    pass


@pytest.fixture(
    params=[*CASES, *PACKED], ids=lambda case: case if isinstance(case, str) else f"{case[0].name}-{case[1]}"
)
def rank(request, tmp_path):
    """Makes ranks of one model, each with some experts of every layer in its slots. `rank.lose_store` does that."""
    if isinstance(request.param, str):
        quantized_folders(tmp_path / "hf", request.param)
        record_checksums(tmp_path / "hf", tmp_path / "m", name="m", on_progress=quiet)
        held = recorded_form(tmp_path / "m")
        cfg, lost = ModelConfig.load(tmp_path / "m").with_packed(held), tmp_path / "hf"
        assert cfg.weights in PACKED_FORMATS
    else:
        cfg, form = request.param
        model_folder(tmp_path / "m", cfg)
        held, cfg, lost = None, dataclasses.replace(cfg, weights=form), tmp_path / "m" / "params"
    shape = ModelShape(cfg=cfg, buckets=(Bucket(decode=2, tiles=0, max_pages=2),), page_size=8, pages=2)

    def make(*experts: int) -> tuple[LiveArrays, HostExpertBuffer]:
        arrays = LiveArrays(shape, open_store(tmp_path / "m", held=held))
        arrays.enter_device(jax.devices()[0])
        fill(arrays, *experts)
        return arrays, HostExpertBuffer(arrays)

    make.lose_store = lambda: shutil.rmtree(lost)
    return make


def fill(arrays: LiveArrays, *experts: int):
    slots = np.tile(np.array(experts, np.int32), (arrays.shape.cfg.n_moe_layers, 1))
    return arrays.fill(slots, None, jax.devices()[0])


def whole(buffer: HostExpertBuffer, of: WeightsKey, count: int) -> tuple[bytes, tuple[int, ...]]:
    """All bytes of weights, read in pieces of `count`, and the checksums sent with the first."""
    first = buffer.read(of, 0, count)
    rest = [buffer.read(of, at, count).rows for at in range(count, first.size, count)]
    rows = first.rows + b"".join(rest)
    assert len(rows) == first.size
    return rows, first.checksums


def hand_over(
    buffer: HostExpertBuffer, of: WeightsKey, rows: bytes, count: int, checksums: tuple[int, ...] = ()
) -> None:
    for at in range(0, len(rows), count):
        buffer.write(of, at, len(rows), rows[at : at + count], checksums)


def xor(*parts: bytes) -> bytes:
    return functools.reduce(np.bitwise_xor, [np.frombuffer(part, np.uint8) for part in parts]).tobytes()


def bits(arrays: LiveArrays, layer: int, slot: int) -> list[bytes]:
    return [np.ascontiguousarray(leaf).tobytes() for leaf in jax.tree.leaves(arrays.expert(layer, slot))]


@pytest.mark.parametrize("count", [700, 1 << 20])
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_the_expert_that_is_lost_comes_back_in_every_bit_without_a_store(rank, lost, count):
    ranks = [rank(expert) for expert in range(3)]
    keeper, target = rank(3)[1], rank(3, -1)[0]
    layers = ranks[0][0].shape.cfg.n_moe_layers
    buffer = HostExpertBuffer(target)
    sums = {}
    for layer in range(layers):
        parts = [whole(ranks[e][1], WeightsKey(layer, (e,)), count) for e in range(3)]
        sums[layer] = parts[lost][1]
        hand_over(keeper, WeightsKey(layer, (0, 1, 2), True), xor(*(rows for rows, _ in parts)), count)
    rank.lose_store()
    for layer in range(layers):
        kept, _ = whole(keeper, WeightsKey(layer, (0, 1, 2), True), count)
        others = [whole(ranks[e][1], WeightsKey(layer, (e,)), count)[0] for e in range(3) if e != lost]
        hand_over(buffer, WeightsKey(layer, (lost,)), xor(kept, *others), count, sums[layer])
    filled = fill(target, 3, lost)
    assert (filled.read, filled.injected, filled.missing) == (0, layers, ())
    for layer in range(layers):
        assert bits(target, layer, 1) == bits(ranks[lost][0], layer, 0)
        assert target.is_intact(layer, 1)


def test_bytes_of_another_expert_are_refused_and_the_store_is_asked(rank):
    arrays, buffer = rank(0)
    other, own = (whole(rank(e)[1], WeightsKey(0, (e,)), 1000) for e in (1, 2))
    with pytest.raises(ParityError, match="bytes that are not its weights"):
        hand_over(buffer, WeightsKey(0, (2,)), other[0], 1000, own[1])
    flipped = bytearray(own[0])
    flipped[-1] ^= 1
    with pytest.raises(ParityError, match="bytes that are not its weights"):
        hand_over(buffer, WeightsKey(0, (2,)), bytes(flipped), 1000, own[1])
    with pytest.raises(ParityError, match="bytes that are not its weights"):
        hand_over(buffer, WeightsKey(0, (2,)), own[0][:-4], 1000, own[1])
    filled = fill(arrays, 2)
    assert (filled.read, filled.injected) == (arrays.shape.cfg.n_moe_layers, 0)


def test_what_is_given_is_for_the_next_plan_alone(rank):
    arrays, buffer = rank(0)
    rows, checksums = whole(rank(1)[1], WeightsKey(0, (1,)), 1000)
    hand_over(buffer, WeightsKey(0, (1,)), rows, 1000, checksums)
    assert fill(arrays, 0).injected == 0
    assert fill(arrays, 1).injected == 0


def test_an_expert_that_is_elsewhere_or_damaged_is_not_handed_out(rank):
    arrays, buffer = rank(0)
    with pytest.raises(ParityError, match="expert 1 of MoE layer 0 is in no slot here"):
        buffer.read(WeightsKey(0, (1,)), 0, 10)
    spoilt = jax.tree.map(np.array, arrays._experts)
    jax.tree.leaves(spoilt)[0].reshape(-1).view(np.uint8)[0] ^= 1
    arrays._experts = spoilt
    with pytest.raises(ParityError, match="expert 0 of MoE layer 0 is not intact here"):
        buffer.read(WeightsKey(0, (0,)), 0, 10)


def test_parity_is_kept_until_its_layer_wants_others(rank):
    _, buffer = rank(0)
    first, second, elsewhere = (WeightsKey(layer, of, True) for layer, of in ((0, (0, 1)), (0, (1, 2)), (1, (0, 1))))
    for of in (first, second, elsewhere):
        hand_over(buffer, of, b"abc", 2)
    buffer.keep_only(0, [second])
    with pytest.raises(ParityError, match="not kept here"):
        buffer.read(first, 0, 10)
    assert buffer.read(second, 1, 10).rows == b"bc"
    assert buffer.read(elsewhere, 0, 2).rows == b"ab"


def test_pieces_that_do_not_follow_on_each_other_are_refused(rank):
    _, buffer = rank(0)
    with pytest.raises(ParityError, match="do not follow"):
        buffer.write(WeightsKey(0, (1, 2), True), 4, 8, b"abcd")
    buffer.write(WeightsKey(0, (1, 2), True), 0, 8, b"abcd")
    with pytest.raises(ParityError, match="do not follow"):
        buffer.write(WeightsKey(0, (1, 2), True), 4, 8, b"abcdef")
