"""A folder of changed tensors is the model with these tensors and all others as they were."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from moejax.checkpoint.checkpoint import load_params
from moejax.checkpoint.manifest import CheckpointError, content_hash
from moejax.checkpoint.model_folder import CHANGED, MADE
from moejax.checkpoint.published import published_name
from moejax.checkpoint.safetensors import INDEX, SafetensorsFolder
from moejax.config.params import named_tensors
from moejax.tools.changed_tensors import CHANGES, base_folder, change, tensor_types
from moejax.tools.prepare import prepare, prepared_folder
from moejax.tools.same_model import check_same_dtypes, check_same_model
from tests.support.models import MIXTRAL, model_folder
from tests.support.published import published_folder

TOKENIZER = Path(__file__).parents[3] / "models" / "tiny" / "tokenizer.json"


def changes_of(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    """A folder as the server receives it."""
    folder.mkdir()
    described, data = {}, b""
    for name, array in arrays.items():
        described[name] = (array.dtype.name, array.shape, len(data))
        data += array.tobytes()
    (folder / "data").write_bytes(data)
    (folder / "tensors.json").write_text(json.dumps(described))
    return folder


def same(found: np.ndarray, array: np.ndarray) -> bool:
    return (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_folder_of_ours_has_the_changed_tensors_and_the_others(tmp_path: Path, dtype: type) -> None:
    base = tmp_path / "m"
    tensors = named_tensors(model_folder(base, MIXTRAL, dtype))
    assert tensor_types(base) == {n: (a.dtype.name, a.shape, a.nbytes) for n, a in tensors.items()}
    names = ["embed", next(name for name in tensors if "experts.down" in name)]
    given = {name: (tensors[name] + 1).astype(dtype) for name in names}
    change(base, changes_of(tmp_path / "changes", given), tmp_path / "new")
    found = named_tensors(load_params(tmp_path / "new", dtype=None))
    assert all(same(found[name], given.get(name, array)) for name, array in tensors.items())
    assert content_hash(tmp_path / "new") != content_hash(base)
    check_same_dtypes(tmp_path / "new", base)
    change(tmp_path / "new", changes_of(tmp_path / "back", {n: tensors[n] for n in names}), tmp_path / "newer")
    shutil.rmtree(tmp_path / "new")
    assert content_hash(tmp_path / "newer") == content_hash(base)
    found = named_tensors(load_params(tmp_path / "newer", dtype=None))
    assert all(same(found[name], array) for name, array in tensors.items())


@pytest.mark.parametrize("shards", [1, 3])
def test_a_published_folder_has_links_to_what_is_in_use_and_one_new_file(
    tmp_path: Path, cache: Path, shards: int
) -> None:
    base = tmp_path / "mixtral"
    tensors = published_folder(base, dtype=ml_dtypes.bfloat16, shards=shards)
    assert tensor_types(base) == {n: (a.dtype.name, a.shape, a.nbytes) for n, a in tensors.items()}
    first, second = (sorted(tensors)[at] for at in (0, 5))
    given = {name: (tensors[name] + 1).astype(ml_dtypes.bfloat16) for name in (first, second)}
    change(base, changes_of(tmp_path / "changes", given), tmp_path / "v1")
    assert {each.name for each in (tmp_path / "v1").iterdir() if not each.is_symlink()} == {CHANGED, INDEX, CHANGES}
    assert published_name(tmp_path / "v1") == "mixtral"
    found = SafetensorsFolder.open(tmp_path / "v1")
    assert found.names() == set(tensors)
    assert all(same(found.read(name), given.get(name, array)) for name, array in tensors.items())
    check_same_model(tmp_path / "v1", prepared_folder(str(base), "float32", "replicated", mtp=False), sharded=False)

    given[second] = tensors[second]
    change(tmp_path / "v1", changes_of(tmp_path / "more", {second: tensors[second]}), tmp_path / "v2")
    shutil.rmtree(tmp_path / "v1")  # no version needs the folder of another
    found = SafetensorsFolder.open(tmp_path / "v2")
    assert all(same(found.read(name), given.get(name, array)) for name, array in tensors.items())
    assert set(SafetensorsFolder.open(tmp_path / "v2").stored) == set(tensors)
    everything = {name: (array + 2).astype(array.dtype) for name, array in tensors.items()}
    change(tmp_path / "v2", changes_of(tmp_path / "all", everything), tmp_path / "v3")
    assert [each.name for each in (tmp_path / "v3").glob("*.safetensors")] == [CHANGES]


@pytest.mark.parametrize("how", ["replicated", "in-place"])
def test_what_is_made_of_changed_tensors_goes_with_their_folder(tmp_path: Path, cache: Path, how: str) -> None:
    base = tmp_path / "mixtral"
    tensors = published_folder(base)
    name = sorted(tensors)[3]
    served = prepare(str(base), "float32", how)
    before = set((cache / "models").iterdir())
    change(base, changes_of(tmp_path / "changes", {name: tensors[name] + 1}), tmp_path / "v1")
    made = prepare(str(tmp_path / "v1"), "float32", how, "1", "auto", str(served["folder"]))
    assert made["content"] != served["content"]
    assert Path(str(made["folder"])).parent == tmp_path / "v1" / MADE
    assert set((cache / "models").iterdir()) == before


def test_a_folder_that_has_changed_since_it_was_read_is_refused(tmp_path: Path, cache: Path) -> None:
    base = tmp_path / "m"
    model_folder(base, MIXTRAL)
    content = content_hash(base)
    assert base_folder(str(base), "float32", "replicated", content) == base
    model_folder(base, MIXTRAL, seed=2)
    with pytest.raises(CheckpointError, match=r"m holds other weights than those in force"):
        base_folder(str(base), "float32", "replicated", content)


def test_nothing_is_left_of_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    base = tmp_path / "m"
    tensors = named_tensors(model_folder(base, MIXTRAL))
    changes = changes_of(tmp_path / "changes", {"embed": tensors["embed"]})
    (changes / "data").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="has 5 bytes, and a tensor ends at"):
        change(base, changes, tmp_path / "new")
    (changes / "data").write_bytes(tensors["embed"].tobytes())
    next(file for file in (base / "params").rglob("*") if file.is_file() and file.stat().st_size > 4000).unlink()
    with pytest.raises((CheckpointError, ValueError)):
        change(base, changes, tmp_path / "new")
    assert {each.name for each in tmp_path.iterdir()} == {"m", "changes"}
