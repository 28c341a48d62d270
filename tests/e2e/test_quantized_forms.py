"""Every form in which weights are published is answered from over HTTP, with the tokens of the plain reference for the
numbers that the form stands for."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from moejax.checkpoint.download import cache_folder
from moejax.checkpoint.families import read_config
from moejax.tools.resolve import published_place
from serving.server import Server
from serving.text.tokenizer import Message, Tokenizer
from tests.e2e.conftest import ONE_BUCKET
from tests.parity.programs import load_folder
from tests.support.gguf_files import Kind, config_of, type_of, write_gguf
from tests.support.quantized_folders import LARGE, quantized_folders
from tests.support.reference_answers import clear_tokens, folder_answer

FP8, FP4, INT4 = ("fp8-block", "fp8-tensor", "fp8-channel"), ("mxfp4", "nvfp4"), ("int4", "int4-32", "int4-rows")
FORMS = {ml_dtypes.bfloat16: (*FP8, "int8", *FP4, *INT4), np.float16: ("awq", "gptq")}
"""By the type that they are widened to. One server serves those of a type, one after the other, as new weights."""
PLAIN = (Kind.F32, Kind.F16, Kind.BF16)
"""Types of GGUF that stay as they are; the others become float16."""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for converted in (cache_folder() / "models").glob("form-*"):
        shutil.rmtree(converted)


def said(url: str, tokenizer: Tokenizer, expected: list[int]) -> None:
    """The server answers with these tokens."""
    body = {"messages": [{"role": "user", "content": "To be"}], "temperature": 0, "ignore_eos": True, "logprobs": True}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body | {"max_tokens": len(expected)}, timeout=60).json()
    found = [tuple(each["bytes"] or ()) for each in answer["choices"][0]["logprobs"]["content"]]
    assert found == [tuple(tokenizer.token_bytes(token)) for token in expected]


@pytest.mark.parametrize(
    ("wide", "forms"),
    [
        (ml_dtypes.bfloat16, FORMS[ml_dtypes.bfloat16][:1]),
        *(pytest.param(wide, forms, marks=pytest.mark.slow) for wide, forms in FORMS.items()),
    ],
)
def test_a_quantized_folder_is_answered_from_over_http(wide: type, forms: tuple[str, ...], place: Path) -> None:
    folders = {
        form: quantized_folders(place / f"form-{form}", form, wide=wide, seed=i, sizes=LARGE)
        for i, form in enumerate(forms)
    }
    first, held = str(place / f"form-{forms[0]}"), "float32" if wide is np.float16 else "bfloat16"
    with Server(model=first, ranks=1, buckets=ONE_BUCKET, data_type=held, edges=0, operate=True) as server:
        for form, plain in folders.items():
            if form != forms[0]:
                body = {"action": "weights", "model": str(place / f"form-{form}"), "version": form}
                applied = httpx.post(f"{server.url}/fault_tolerance/apply", json=body, timeout=120)
                assert applied.status_code == 200, applied.text
            _, expected, tokenizer = folder_answer(plain)
            said(server.url, tokenizer, expected)


@pytest.mark.slow
def test_a_file_of_llama_cpp_in_all_its_types_is_answered_from_over_http(place: Path) -> None:
    file, plain = place / "form-gguf.gguf", place / "plain"
    numbers = {
        name: array if type_of(name, array.ndim) in PLAIN else array.astype(np.float16).astype(np.float32)
        for name, array in write_gguf(file, "mixtral").items()
    }
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps(config_of("mixtral")))
    save_file(numbers, plain / "model.safetensors")
    cfg = read_config(plain)
    with Server(model=str(file), ranks=1, buckets=ONE_BUCKET, edges=0) as server:
        folder = published_place(file)
        tokenizer = Tokenizer.load(folder, bos_token=cfg.bos_token, stop_tokens=cfg.stop_tokens)
        prompt = list(tokenizer.chat([Message("user", "To be")]))
        said(server.url, tokenizer, clear_tokens(load_folder(plain, cfg), cfg, prompt))
