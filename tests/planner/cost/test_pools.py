"""Laws of pools for prompts and decode: the slower side sets the rate, and no split has a rank twice or none."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import InputError, NoFeasiblePlan
from planner.cost.design import design
from planner.cost.pools import design_pools
from planner.cost.throughput import assess, cache_transfer_seconds
from planner.inputs.cluster import read_cluster
from planner.inputs.published import read_model
from planner.inputs.traffic import Traffic
from planner.plan.deployment import FaultTolerance

MODELS = ["mixtral-8x7b", "qwen3-30b-a3b", "llama-3.1-8b"]


@settings(max_examples=10)
@given(
    st.sampled_from(MODELS),
    st.sampled_from(["h100:2x8", "h200:3x4", "h100:1x8"]),
    st.integers(128, 16384),
    st.integers(16, 2048),
)
def test_pools_meet_the_traffic_with_the_rate_of_the_slower_side(name, where, prompt, output):
    model, cluster = read_model(name), read_cluster(where)
    traffic = Traffic(prompt=prompt, output=output)
    found = design_pools(model, cluster, traffic=traffic)
    pooled, rates = found.deployment, found.rates
    assert rates.rate == min(rates.prompts, rates.decode, rates.network)
    assert rates.tpot * 1e3 <= traffic.tpot_ms
    assert rates.ttft * 1e3 <= traffic.ttft_ms
    assert rates.transfer_bytes == model.cache_bytes(prompt)
    ids = [rank for pool in pooled.pools().values() for rank in pool.plan.rank_ids]
    assert sorted(ids) == sorted(set(ids))
    assert set(ids) <= set(cluster.ids)
    for pool in pooled.pools().values():
        pool.plan.validate()
    again = found.splits[0][3]
    assert again.rate == pytest.approx(rates.rate, rel=0.02)  # before its experts were placed
    assert all(again.rate >= other.rate for *_, other in found.splits if other.ttft * 1e3 <= traffic.ttft_ms)


def test_deepseek_v3_on_twelve_hosts_gains_by_pools():
    model, cluster = read_model("deepseek-v3"), read_cluster("h100:12x8")
    pools, one = design_pools(model, cluster), design(model, cluster)
    assert pools.tokens_per_second > 1.2 * one.chosen.tokens_per_second
    assert 0.8 < pools.rates.prompts / pools.rates.decode < 1.25
    assert len(pools.splits) > 5


def test_decode_alone_is_never_slower_than_with_prompts_and_neither_are_prompts():
    model, cluster, traffic = read_model("qwen3-30b-a3b"), read_cluster("h100"), Traffic()
    shape = design(model, cluster, traffic=traffic).chosen.shape
    both, decode, prompts = (assess(model, cluster, shape, traffic, work=work) for work in ("all", "decode", "prompts"))
    assert decode.tokens_per_second >= both.tokens_per_second
    assert prompts.tokens_per_second >= both.tokens_per_second
    assert 1 / (1 / decode.tokens_per_second + 1 / prompts.tokens_per_second) < 1.3 * both.tokens_per_second


def test_a_cache_is_sent_over_as_many_ports_as_share_it():
    model, cluster = read_model("llama-3.1-8b"), read_cluster("h100:2x8")
    assert cache_transfer_seconds(model, cluster, 1000) == pytest.approx(model.cache_bytes(1000) / 5e10)
    assert cache_transfer_seconds(model, cluster, 1000, lanes=4) == pytest.approx(model.cache_bytes(1000) / 2e11)


def test_what_will_not_do_says_why():
    model = read_model("mixtral-8x7b")
    with pytest.raises(NoFeasiblePlan, match="asked 1 ms"):
        design_pools(model, read_cluster("h100:2x8"), traffic=Traffic(ttft_ms=1))
    with pytest.raises(NoFeasiblePlan, match="decode"):
        design_pools(model, read_cluster("h100:2x8"), traffic=Traffic(tpot_ms=0.1))
    with pytest.raises(NoFeasiblePlan):
        design_pools(model, read_cluster("h100:2x8"), survive=FaultTolerance(ranks=8))
    with pytest.raises(InputError, match="need two"):
        design_pools(model, read_cluster("h100:1x1"))
