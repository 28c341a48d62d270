"""Laws of the cost model: figures that can be worked out by hand, and directions that must hold."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner import Cluster, Hardware, Workload
from planner.cost.roofline import PARTS, StepTime, part_seconds, prefill_time, step_time
from planner.cost.step_work import step_work
from planner.cost.throughput import assess
from planner.cost.trade_off import pareto
from planner.inputs.cluster import read_cluster
from planner.inputs.engine import engine_of
from planner.inputs.published import read_model
from planner.inputs.traffic import Traffic
from planner.plan.shape import Shape
from planner.solver.shapes import cache_pages, mesh_shapes, rest_bytes

HAND = Hardware(
    name="hand",
    memory_bytes=1000,
    memory_bandwidth=100.0,
    flops=1000.0,
    link_bandwidth=10.0,
    network_bandwidth=5.0,
    collective_latency=0.5,
    step_overhead=0.25,
    efficiency=1.0,
)
MODEL = Workload(
    moe_layers=2,
    layers=2,
    experts=4,
    experts_per_token=1,
    expert_bytes=10,
    rest_bytes=200,
    cache_bytes_per_token=1,
    page_tokens=10,
    hidden_bytes=2,
    expert_flops=5.0,
    rest_flops=50.0,
)


def one(ranks: int = 1, slots: int = 4) -> Shape:
    return Shape(
        arch="collocated",
        tensor=1,
        dense=1,
        slots=slots,
        roles=("collocated",) * ranks,
        groups=tuple(range(ranks)),
    )


def test_a_step_on_one_device_is_its_bytes_over_bandwidth():
    step = step_time(MODEL, Cluster(name="c", devices=Cluster.local(1).devices, hardware=HAND), one(), 1, 100)
    assert step.attention == pytest.approx((200 + 100) / 100)
    touched = 4 * (1 - 2.718281828 ** (-1 / 4))
    assert step.experts == pytest.approx(touched * 2 * 10 / 100)
    assert step.exchange == 0
    assert step.total == pytest.approx(0.25 + step.attention + step.experts)


def test_many_tokens_are_bound_by_flops():
    cluster = Cluster(name="c", devices=Cluster.local(1).devices, hardware=HAND)
    step = step_time(MODEL, cluster, one(), 1000, 0)
    assert step.attention == pytest.approx(1000 * 50 / 1000)
    assert step.experts == pytest.approx(1000 * 2 * 5 / 1000)


def test_an_exchange_is_its_bytes_over_links_and_network_and_two_latencies_a_layer():
    hosts = Cluster(name="c", devices=Cluster.local(2, hosts=["a", "b"]).devices, hardware=HAND)
    step = step_time(MODEL, hosts, one(2, 2), 10, 0)
    moved = 10 * 1 * 2 * 2.0
    assert step.exchange == pytest.approx(2 * (moved / 2 / 10 + moved / 2 / 5 + 2 * 0.5))
    together = Cluster(name="c", devices=Cluster.local(2).devices, hardware=HAND)
    assert step_time(MODEL, together, one(2, 2), 10, 0).exchange == pytest.approx(2 * (moved / 10 + 1.0))


seconds = st.floats(0, 10)


@given(seconds, seconds, seconds, seconds, st.floats(0, 1))
def test_two_batches_hide_no_more_than_the_shorter_of_work_and_exchange(
    attention, experts, exchange, overhead, dispatch
):
    parts = {"attention": attention, "experts": experts, "exchange": exchange, "overhead": overhead}
    hidden = StepTime(**parts, overlapped=False, hidden=True, dispatch=dispatch).total
    assert hidden >= overhead + max(attention + experts, exchange) - 1e-9
    assert hidden <= StepTime(**parts, overlapped=False).total + 1e-9


@given(st.integers(1, 4096), st.sampled_from([2, 4, 8]))
def test_experts_that_ranks_share_are_never_faster(tokens, shared):
    model, cluster = read_model("deepseek-v3"), read_cluster("h200")
    engine, shape = engine_of(cluster.hardware), replace(one(8, 32), tensor=8, dense=8, groups=(0,) * 8)
    works = [step_work(model, cluster, shape, tokens, 0, reduces_experts=True, expert_tensor=w) for w in (1, shared)]
    whole, apart = (part_seconds(work, engine)[PARTS.index("experts")] for work in works)
    assert whole <= apart


@given(st.integers(1, 4), st.integers(1, 512), st.floats(0, 1))
def test_a_step_with_drafts_takes_longer_and_gives_at_most_all_of_them(drafts, requests, accepted):
    model, cluster, shape = read_model("deepseek-v3"), read_cluster("h200:4x8"), one(32, 9)
    drafting = model.with_drafts(drafts, accepted)
    plain, longer = (step_time(each, cluster, shape, requests, 2048).total for each in (model, drafting))
    assert plain < longer
    assert 1 <= drafting.kept <= 1 + drafts
    assert model.with_drafts(drafts, 0.0).kept == model.kept == 1
    assert rest_bytes(drafting, 1, 1) > rest_bytes(model, 1, 1)


@given(st.integers(1, 8), st.integers(1, 512), st.floats(0, 1))
def test_drafts_by_look_up_cost_their_rows_and_no_layer(drafts, requests, accepted):
    model, cluster, shape = read_model("deepseek-v3"), read_cluster("h200:4x8"), one(32, 9)
    looked_up, layered = (model.with_drafts(drafts, accepted, layers=layers) for layers in (0, 1))
    plain, rows, both = (step_time(w, cluster, shape, requests, 2048).total for w in (model, looked_up, layered))
    assert plain < rows < both
    assert looked_up.kept == layered.kept
    assert rest_bytes(looked_up, 1, 1) == rest_bytes(model, 1, 1)
    assert looked_up.slot_bytes == model.slot_bytes


def test_drafted_tokens_read_the_cache_of_their_request_once():
    cluster = Cluster(name="c", devices=Cluster.local(1).devices, hardware=HAND)
    drafting = replace(MODEL, drafts=1, accepted=0.5)
    once, drafted = (step_work(each, cluster, one(), 10, 100) for each in (MODEL, drafting))
    assert drafted.cache == once.cache == 10 * 100
    assert drafted.products == pytest.approx(2 * once.products * (1 + 1 / 4))  # two layers, and one for the draft
    assert drafting.kept == 1.5


def test_memory_goes_to_weights_first_and_the_rest_to_pages():
    cluster = Cluster(name="c", devices=Cluster.local(1).devices, hardware=HAND)
    assert cache_pages(MODEL, cluster, 4) == (920 - 200 - 4 * 20) // 10
    assert cache_pages(MODEL, Cluster.local(1), 4) == 0


@given(
    st.sampled_from(["memory_bandwidth", "flops", "link_bandwidth", "network_bandwidth"]),
    st.integers(1, 64),
    st.floats(0, 1e4),
)
def test_faster_hardware_is_never_slower(field, tokens, context):
    cluster = read_cluster("h100:2x8")
    model = read_model("mixtral-8x7b")
    fast = replace(cluster, hardware=replace(cluster.hardware, **{field: getattr(cluster.hardware, field) * 2}))
    shape = one(16, 1)
    assert step_time(model, fast, shape, tokens, context).total <= (
        step_time(model, cluster, shape, tokens, context).total
    )


@given(st.integers(1, 512), st.integers(1, 512), st.floats(1, 3), st.floats(1, 3))
def test_more_tokens_and_hotter_ranks_are_never_faster(a, b, p, q):
    cluster, model, shape = read_cluster("h200:4x8"), read_model("qwen3-30b-a3b"), one(32, 4)
    low, high = sorted((a, b)), sorted((p, q))
    assert step_time(model, cluster, shape, low[0], 2048, peak=high[0]).total <= (
        step_time(model, cluster, shape, low[1], 2048, peak=high[1]).total
    )
    assert prefill_time(model, cluster, shape, low[0]) <= prefill_time(model, cluster, shape, low[1])


@given(st.floats(0, 0.99), st.floats(0, 0.99), st.sampled_from(["h200", "cpu"]))
def test_what_the_prefix_cache_has_of_prompts_is_not_computed(a, b, chip):
    model, cluster = read_model("qwen3-30b-a3b"), read_cluster(chip)
    few, many = (
        assess(model, cluster, one(1, 128), Traffic(prompt=4096, tpot_ms=1e6, ttft_ms=1e6, cached=share))
        for share in sorted((a, b))
    )
    assert many.tokens_per_second >= few.tokens_per_second
    assert many.ttft_seconds <= few.ttft_seconds
    assert many.requests_per_group >= few.requests_per_group


def test_an_exchange_over_the_network_takes_at_least_its_latency():
    model, shape = read_model("qwen3-235b-a22b"), one(16, 8)
    inside, across = (
        step_time(model, Cluster.regular("", 16 // each, each, hardware=read_cluster("h200").hardware), shape, 1, 10)
        for each in (16, 8)
    )
    latency = 2 * model.moe_layers * read_cluster("h200").hardware.collective_latency
    assert inside.exchange < latency <= across.exchange


def test_tensor_groups_shard_weights_but_not_a_latent_cache():
    v3, mixtral = read_model("deepseek-v3"), read_model("mixtral-8x7b")
    assert rest_bytes(v3, 2, 2) == pytest.approx(v3.rest_bytes / 2, abs=2)
    assert rest_bytes(v3, 1, 8) == pytest.approx(v3.rest_bytes - v3.dense_bytes * 7 / 8, abs=2)
    cluster = read_cluster("h200:4x8")
    rest = 10**9
    assert cache_pages(v3, cluster, 8, tensor=2, rest=rest) == cache_pages(v3, cluster, 8, rest=rest)
    assert cache_pages(mixtral, cluster, 2, tensor=2, rest=rest) >= 2 * cache_pages(mixtral, cluster, 2, rest=rest)


def test_seven_of_eight_devices_leave_one_without_a_tensor_group():
    cluster = read_cluster("h100")
    devices = cluster.devices[:7]
    found = {s.tensor: s for s in mesh_shapes(read_model("mixtral-8x7b"), cluster, devices)}
    assert set(found) == {1, 2, 4}
    assert found[1].data == 7
    assert (found[2].data, found[2].roles.count("expert")) == (3, 1)
    assert (found[4].data, found[4].roles.count("expert")) == (1, 3)
    assert all(s.expert_rank_count == 7 for s in found.values())


def test_what_does_not_fit_or_is_too_slow_says_so():
    model, traffic = read_model("mixtral-8x7b"), Traffic()
    cluster = read_cluster("h100")
    assert "weights leave no room for cache" in assess(model, cluster, one(8, 40), traffic).reason
    slow = assess(model, cluster, one(8, 2), Traffic(tpot_ms=1))
    assert "of a single request takes" in slow.reason
    late = assess(model, cluster, one(8, 2), Traffic(ttft_ms=1))
    assert "first token after" in late.reason
    assert "hold no request of" in assess(model, cluster, one(8, 2), Traffic(prompt=10**7)).reason


def test_the_front_of_the_trade_off_has_no_dominated_point():
    model, cluster = read_model("deepseek-v3"), read_cluster("h200:4x8")
    front = pareto(model, cluster, list(mesh_shapes(model, cluster, cluster.devices)), Traffic())
    assert len(front) > 3
    for a, b in pairwise(front):
        assert a["per_user"] >= b["per_user"]
        assert a["per_device"] < b["per_device"]
