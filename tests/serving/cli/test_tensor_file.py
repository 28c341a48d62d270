"""A safetensors file is read as the library reads it, and a damaged one is named."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from moejax.checkpoint.safetensors import DTYPES as READ
from serving.cli.tensor_file import DTYPES, read_tensors
from serving.errors import InvalidRequest


def test_tensors_come_as_they_were_saved(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(4, dtype=np.float32).astype(ml_dtypes.bfloat16),
        "c": np.zeros((0, 2), np.int64),
    }
    save_file(arrays, tmp_path / "x.safetensors", {"format": "pt"})
    found = dict(read_tensors(tmp_path / "x.safetensors"))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def test_formats_are_those_of_models() -> None:
    assert {name: np.dtype(dtype) for name, dtype in DTYPES.items()} == READ


@pytest.mark.parametrize("content", [b"", b"not one", b"\x10" + b"\0" * 7 + b"[1]             "])
def test_another_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(InvalidRequest, match=r"x\.safetensors is no whole safetensors file"):
        list(read_tensors(file))


def test_so_is_a_file_that_is_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": np.ones(8)}, file)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InvalidRequest, match="no whole safetensors file"):
        list(read_tensors(file))
