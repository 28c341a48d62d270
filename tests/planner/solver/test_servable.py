"""The memory of a plan has room for all that `moejax serve` holds."""

from dataclasses import replace

import pytest

from planner.cost.design import design
from planner.errors import InputError
from planner.inputs.cluster import read_cluster
from planner.inputs.layer_states import STATES_PER_REQUEST
from planner.inputs.published import (
    cache_number_bytes,
    find_published,
    published_model,
    read_model,
    unwindowed_cache_elements,
)
from planner.solver.servable import SERVED_REQUESTS, check_servable, served_cache_format, served_pages
from planner.solver.shapes import memory_budget, rest_bytes


@pytest.mark.parametrize("name", ["qwen3-next-80b-a3b", "lfm2-8b-a1b", "nemotron-3-nano-30b-a3b"])
def test_weights_pages_and_states_of_a_model_with_states_fit_in_memory(name: str) -> None:
    _, config = find_published(name)
    model = read_model(name)
    d = replace(design(model, read_cluster("h200:1x8"), tensor=1, dense=1).deployment, config=config)
    check_servable(d)
    weights = rest_bytes(model, 1, 1) + d.plan.slots_per_rank * model.slot_bytes
    entry = 2 * unwindowed_cache_elements(published_model(config, weights="bfloat16"))
    states = STATES_PER_REQUEST * SERVED_REQUESTS * model.state_bytes
    budget = memory_budget(d.cluster)
    assert budget is not None
    assert 0.99 * budget < weights + served_pages(d) * model.page_tokens * entry + states <= budget
    few = replace(d, plan=replace(d.plan, pages_per_rank=states // model.page_bytes))
    with pytest.raises(InputError, match="no room for cache beside the states of 32 requests"):
        check_servable(few)


def test_more_drafts_than_a_server_takes_are_refused_with_both_numbers() -> None:
    model = read_model("mixtral-8x7b")
    assert model.with_drafts(15, 0.5, layers=0).drafts == 15
    with pytest.raises(InputError, match=r"drafts=20, .* at most 15"):
        model.with_drafts(20, 0.5, layers=0)


def test_pages_are_of_the_format_that_a_server_on_tpus_keeps_and_of_a_layer_that_drafts() -> None:
    _, config = find_published("deepseek-v3")
    model = read_model("deepseek-v3", cache="int8")
    gpu, tpu = (
        replace(design(model, read_cluster(name), tensor=1, dense=1).deployment, config=config)
        for name in ("h200:2x8", "v5p:8x4")
    )
    assert (served_cache_format(gpu), served_cache_format(tpu)) == ("int8", "float32")
    int8 = cache_number_bytes(published_model(config, weights="bfloat16"), "int8")
    for plain in (gpu, tpu):
        drafting = replace(plain, workload=replace(plain.workload, drafts=1, draft_layers=1))
        layers = 1 + 1 / model.layers
        wider = 1 if plain is tpu else 4 / int8
        assert served_pages(drafting) == pytest.approx(served_pages(plain) / layers / wider, rel=1e-3)
