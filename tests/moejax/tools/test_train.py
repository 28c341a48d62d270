"""Laws of training: a run is a function of its preset, stopped or not; the shipped model is what it says."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from moejax.checkpoint.checkpoint import load_params, save_model
from moejax.checkpoint.manifest import content_hash
from moejax.checkpoint.mtp_head import join_head
from moejax.config.config_values import ConfigError
from moejax.config.model_config import ModelConfig
from moejax.config.params import init_params, without_mtp
from moejax.model.reference import losses
from moejax.tools import train as training_module
from moejax.tools.corpus import Domain
from moejax.tools.resolve import ensure_model
from moejax.tools.score import bits_per_byte, token_windows
from moejax.tools.train import (
    TrainingConfig,
    TrainingPhase,
    agreement,
    draw_batch,
    encode_domain,
    load_preset,
    main,
    train,
    train_mtp,
    train_tokenizer,
)
from planner.inputs.shipped import shipped
from tests.support.models import MIXTRAL, random_params

SHORT = TrainingConfig(
    learning_rate=1e-2,
    warmup=2,
    weight_decay=0.01,
    balance=0.01,
    capacity_factor=2.0,
    seed=1,
    save_every=4,
    phases=(TrainingPhase(steps=8, batch=4, sequence=16), TrainingPhase(steps=4, batch=2, sequence=32)),
)
MODEL = dataclasses.replace(MIXTRAL, n_layers=1, moe=dataclasses.replace(MIXTRAL.moe, experts=2, experts_per_token=1))
HELD_OUT = ("python.txt", "wordnet.txt")
STREAMS = [np.arange(500, dtype=np.int32) % n for n in (5, 7)]


class Stop(Exception):
    """Stands for a power cut."""


def test_a_run_that_was_stopped_ends_like_one_that_was_not(tmp_path, monkeypatch):
    whole = train(MODEL, SHORT, tmp_path / "whole", STREAMS)

    def cut(streams, training, step, draw=draw_batch):
        if step == 6:
            raise Stop
        return draw(streams, training, step)

    monkeypatch.setattr(training_module, "draw_batch", cut)
    with pytest.raises(Stop):
        train(MODEL, SHORT, tmp_path / "cut", STREAMS)
    monkeypatch.setattr(training_module, "draw_batch", draw_batch)
    resumed = train(MODEL, SHORT, tmp_path / "cut", STREAMS)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_a_layer_that_drafts_is_trained_beside_a_model_that_stays_as_it_is(tmp_path, capsys):
    folder, head = tmp_path / "small", tmp_path / "small" / "mtp"
    texts = tuple((shipped("models/tiny") / "held_out" / name).read_text("utf-8")[:3000] for name in HELD_OUT)
    tokenizer, cfg = train_tokenizer([Domain("both", texts, texts)], 300), dataclasses.replace(MODEL, vocab_size=300)
    tokenizer_json = tokenizer.to_str()
    save_model(folder, cfg, random_params(cfg), tokenizer_json=tokenizer_json, chat_template="{{ messages }}")
    before, params = content_hash(folder), load_params(folder)
    short = dataclasses.replace(SHORT, phases=(TrainingPhase(steps=4, batch=2, sequence=16),))
    train_mtp(folder, short, [Domain("both", texts * 2, texts)])
    assert "of drafts are the model's own likeliest token" in capsys.readouterr().out
    assert content_hash(folder) == before
    joined = tmp_path / "joined"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    join_head(folder, head, joined)
    assert (joined / "additional_chat_templates" / "tools.jinja").read_text() == "{{ messages }}"
    cfg = ModelConfig.load(joined)
    whole = load_params(joined, cfg)
    assert cfg.mtp
    jax.tree.map(np.testing.assert_array_equal, without_mtp(whole), params)
    drawn = init_params(cfg, jax.random.key(short.seed)).mtp
    assert np.abs(drawn.project - whole.mtp.project).max() > 5e-3, "the layer has learnt"


def test_a_layer_that_drafts_is_trained_in_the_folder_of_a_model_without_one(tmp_path, capsys):
    cfg = ModelConfig.load(ensure_model("tiny"))
    (tmp_path / "config.json").write_text(dataclasses.replace(cfg, mtp=True).to_json())
    for more, why in ((["--out", "x"], "leave out --out x"), ([], "holds a layer that drafts already")):
        with pytest.raises(SystemExit):
            main(["--mtp", str(tmp_path), *more])
        assert why in capsys.readouterr().err


def test_the_shipped_layer_guesses_better_than_the_token_before_it():
    folder = ensure_model("tiny", mtp=True)
    cfg, tokenizer = ModelConfig.load(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    params = jax.tree.map(jnp.asarray, load_params(folder, cfg))
    text = (shipped("models/tiny") / "held_out" / "python.txt").read_text("utf-8")
    tokens = jnp.asarray([tokenizer.encode(text).ids[:256]])
    assert agreement(params, cfg, tokens) > 0.35
    head = shipped("models/tiny") / "mtp"
    assert sum(file.stat().st_size for file in head.rglob("*")) < 2_200_000  # in the repository


def test_training_learns(tmp_path):
    longer = dataclasses.replace(SHORT, phases=(TrainingPhase(steps=40, batch=4, sequence=16),), save_every=100)
    batch = draw_batch(STREAMS, longer, 0)
    before = losses(init_params(MODEL, jax.random.key(1)), MODEL, batch).mean()
    after = losses(train(MODEL, longer, tmp_path, STREAMS), MODEL, batch).mean()
    assert after < before / 2


def test_batches_take_domains_in_turn_and_phases_in_order():
    assert [SHORT.phase_at(s).sequence for s in (0, 7, 8, 11)] == [16, 16, 32, 32]
    with pytest.raises(ValueError, match="step 12 lies beyond the last of 12"):
        SHORT.phase_at(12)
    batch = draw_batch(STREAMS, SHORT, 3)
    assert batch.shape == (4, 17)
    assert [row.max() for row in batch] == [4, 6, 4, 6]
    np.testing.assert_array_equal(batch, draw_batch(STREAMS, SHORT, 3))


def test_the_tokenizer_gives_any_text_back():
    domain = Domain("d", ("to be or not to be 1234\n" * 20, "def f(x): return x\n" * 20), ("",))
    tokenizer = train_tokenizer([domain], 270)
    assert tokenizer.get_vocab_size() == 270
    for text in ("to be", "Größe 99 ✓\n\t", " def"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert [t for t in tokenizer.encode("2024").tokens if t.isdigit()] == ["2", "0", "2", "4"]
    assert (encode_domain(tokenizer, domain) == 0).sum() == 2


def test_the_preset_is_the_shipped_model():
    cfg, training = load_preset(shipped("configs/presets/tiny.toml"))
    assert cfg == ModelConfig.load(ensure_model("tiny"))
    assert training.phases[-1].sequence == cfg.max_context


def test_a_preset_with_an_unknown_key_is_refused(tmp_path):
    text = (shipped("configs/presets/tiny.toml")).read_text()
    (tmp_path / "p.toml").write_text(text.replace("warmup", "warm_up"))
    with pytest.raises(ConfigError, match=r"table training: .*warm_up"):
        load_preset(tmp_path / "p.toml")
    (tmp_path / "p.toml").write_text("[model]")
    with pytest.raises(ConfigError, match="lacks the table or key 'training'"):
        load_preset(tmp_path / "p.toml")


def test_a_text_is_read_in_whole_windows():
    tokenizer = Tokenizer.from_file(str(ensure_model("tiny") / "tokenizer.json"))
    count = len(tokenizer.encode("a b c d e f g h").ids)
    assert token_windows(tokenizer, "a b c d e f g h", 3).shape == (count // 3, 3)
    assert token_windows(tokenizer, "a b c d e f g h", 100).shape == (1, count)


@pytest.mark.parametrize("domain", ["shakespeare", "wordnet", "python"])
def test_tiny_has_its_stated_bits_per_byte(domain):
    folder = ensure_model("tiny")
    cfg, tokenizer = ModelConfig.load(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    stated = json.loads((folder / "held_out" / "bits_per_byte.json").read_text())[domain]
    text = (folder / "held_out" / f"{domain}.txt").read_text("utf-8")
    # Stated to three decimals; the rest is float32 rounding.
    assert bits_per_byte(load_params(folder), cfg, tokenizer, text) == pytest.approx(stated, abs=2e-3)
