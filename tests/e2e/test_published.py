"""A folder as models are published is served as it is, and one that contradicts itself is not."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from moejax.checkpoint.checkpoint import load_params
from moejax.checkpoint.download import cache_folder
from moejax.config.model_config import ModelConfig
from moejax.model.reference import greedy
from moejax.tools.resolve import ensure_model
from serving.api.client import Client
from serving.errors import InvalidRequest, StartError
from serving.server import Server
from serving.text.tokenizer import Tokenizer
from tests.e2e.conftest import ONE_BUCKET
from tests.support.published import MIXTRAL, published_folder
from tests.support.quantized_folders import quantized_folders
from tests.support.reference_answers import CLOSE, LENGTH, WIDE_CLOSE, folder_answer
from tests.support.streams import Stream, Traffic, kill, wait_until_whole

LLAMA = {key: value for key, value in MIXTRAL.items() if key not in ("num_local_experts", "num_experts_per_tok")} | {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    published_folder(tmp_path / "mixtral-small", dtype=ml_dtypes.bfloat16)
    yield tmp_path / "mixtral-small"
    for converted in (cache_folder() / "models").glob("mixtral-small-*"):
        shutil.rmtree(converted)


def test_a_published_folder_is_served_as_it_is(folder: Path) -> None:
    with Server(model=str(folder), ranks=2, buckets=ONE_BUCKET) as server, Client(server) as client:
        model = client.model()
        assert (model.name, model.experts) == ("mixtral-small", 4)
        said = client.generate("To be", temperature=0, max_tokens=24, ignore_eos=True)
        chat = client.chat("To be", temperature=0, max_tokens=4, ignore_eos=True)
    ours = ensure_model(folder)
    cfg = ModelConfig.load(ours)
    prompt = Tokenizer.load(ours, bos_token=cfg.bos_token, stop_tokens=cfg.stop_tokens).encode("To be")
    assert list(said.token_ids) == greedy(load_params(ours), cfg, list(prompt), 24)
    assert list(chat.token_ids) == list(said.token_ids)[:4]  # its template is the message as it is


@pytest.fixture
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[tuple[Path, Path]]]:
    """A model in a packed form, and other weights of it, each with the folder of the same numbers in plain form."""
    folders = [tmp_path / f"mixtral-{request.param}", tmp_path / f"mixtral-{request.param}-new"]
    yield [(at, quantized_folders(at, request.param, wide=np.float32, seed=2 * i)) for i, at in enumerate(folders)]
    for converted in (cache_folder() / "models").glob(f"{folders[0].name}-*"):
        shutil.rmtree(converted)


@pytest.mark.parametrize(
    ("packed", "held"),
    [
        ("nvfp4", "nvfp4"),
        ("awq", "published-int4"),
        ("fp8-block", "fp8"),
        pytest.param("fp8-channel", "fp8", marks=pytest.mark.slow),
        ("int8", "published-int8"),
    ],
    indirect=["packed"],
)
def test_packed_weights_are_served_as_published_and_replaced_and_a_killed_rank_changes_no_token(
    packed: list[tuple[Path, Path]], held: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder, plain), (new, new_plain) = packed
    asked = {"model": str(folder), "data_type": "published", "chaos": True}
    with Server(**asked, ranks=2, buckets=ONE_BUCKET) as server, Client(server) as client:
        assert "ranks hold its weights in bfloat16" not in capfd.readouterr().err
        for each in (plain, new_plain):
            prompt, expected, _ = folder_answer(each, WIDE_CLOSE if "8" in held else CLOSE)
            known = Stream(prompt, 0.0, 0, LENGTH)
            known.run(client)
            assert known.tokens[: len(expected)] == expected
            Traffic([known]).during(client)
            Traffic([known, known]).during(client, kill(client, 1))
            wait_until_whole(client)
            Traffic([known]).during(client)  # also on the rank that came back
            if each == plain:
                with pytest.raises(InvalidRequest, match=f"is held in .*float.* as it is published, .* in {held}"):
                    client.apply("weights", model=str(new_plain), version="wide")
                client.apply("weights", model=str(new), version="new")
        assert (client.status().weights_version, client.status().compiles_after_ready) == ("new", 0)


@pytest.fixture
def dense(tmp_path: Path) -> Iterator[Path]:
    published_folder(tmp_path / "llama-small", LLAMA)
    yield tmp_path / "llama-small"
    for converted in (cache_folder() / "models").glob("llama-small-*"):
        shutil.rmtree(converted)


def test_a_model_without_experts_is_served_and_a_lost_rank_changes_no_token(dense: Path) -> None:
    with Server(model=str(dense), ranks=2, buckets=ONE_BUCKET, chaos=True) as server, Client(server) as client:
        said = client.generate("To be", temperature=0, max_tokens=100, ignore_eos=True)
        kill(client, 1)()
        again = client.generate("To be", temperature=0, max_tokens=100, ignore_eos=True)
        assert client.model().experts == client.status().slots_per_rank == 0
    ours = ensure_model(dense)
    cfg = ModelConfig.load(ours)
    prompt = Tokenizer.load(ours, bos_token=cfg.bos_token, stop_tokens=cfg.stop_tokens).encode("To be")
    assert list(said.token_ids) == greedy(load_params(ours), cfg, list(prompt), 100)
    assert again.token_ids == said.token_ids


def test_a_folder_that_contradicts_itself_is_not_served(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "config.json").write_text(json.dumps(MIXTRAL | {"num_key_value_heads": 1}))
    with pytest.raises(StartError, match="could not be prepared"), Server(model=str(folder), ranks=1):
        pass
    said = capfd.readouterr().err
    assert "k_proj.weight has shape (16, 32), but config.json says (8, 32)" in said
