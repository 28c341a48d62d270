"""Laws of the host store: it reads what the checkpoint holds, and distinguishes missing weights from damaged ones."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from moejax.checkpoint import host_copies
from moejax.checkpoint import host_store as store_module
from moejax.checkpoint.checkpoint import load_params
from moejax.checkpoint.checksums import ALIGNMENT
from moejax.checkpoint.convert import convert
from moejax.checkpoint.host_store import HostStore, StoreCorrupt, StoreError, StoreMissing, StoreRefused
from moejax.checkpoint.manifest import CheckpointError
from tests.support.models import DENSE, MIXTRAL, SHARED, model_folder
from tests.support.published import published_folder

EXPERT = "params/state/segments.0.2.moe.experts.down/c/1/3/0/0"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "shared"
    model_folder(folder, SHARED, np.float16)
    return folder


@pytest.fixture
def store(model, tmp_path):
    return HostStore.create(model, tmp_path / "host" / "copy")


def test_experts_are_those_of_the_checkpoint(store, model):
    experts = load_params(model).segments[0][2].moe.experts
    wanted = [(layer, e) for layer in range(2) for e in range(8)]
    read = store.read_experts(wanted)
    assert list(read) == wanted
    for (layer, e), (gate_up, down) in read.items():
        assert gate_up.dtype == down.dtype == np.float32
        np.testing.assert_array_equal(gate_up, experts.gate_up[layer, e])
        np.testing.assert_array_equal(down, experts.down[layer, e])


def test_layers_are_counted_by_depth_in_every_shape_of_model(tmp_path):
    params = model_folder(tmp_path / "m", MIXTRAL)
    read = HostStore.open(tmp_path / "m").read_experts([(2, 1), (0, 3)])
    np.testing.assert_array_equal(read[2, 1][0], params.segments[0][0].moe.experts.gate_up[2, 1])
    np.testing.assert_array_equal(read[0, 3][1], params.segments[0][0].moe.experts.down[0, 3])


@pytest.mark.parametrize("cfg", [MIXTRAL, SHARED, DENSE], ids=lambda c: c.name)
def test_the_rest_is_that_of_the_checkpoint(tmp_path, cfg):
    params = model_folder(tmp_path / "m", cfg)
    rest = HostStore.open(tmp_path / "m").non_expert_params()
    for segment, read in zip(params.segments, rest.segments, strict=True):
        for ours, theirs in zip(segment, read, strict=True):
            if ours.moe is not None:
                assert theirs.moe.experts.gate_up is None
                assert theirs.moe.experts.down is None
                ours = ours.replace(moe=ours.moe.replace(experts=theirs.moe.experts))
            jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    np.testing.assert_array_equal(params.embed, rest.embed)
    assert (params.head is None) == (rest.head is None)


def test_a_second_call_finds_the_copy(store, model):
    before = (store.folder / EXPERT).stat().st_mtime_ns
    assert HostStore.create(model, store.folder).folder == store.folder
    assert (store.folder / EXPERT).stat().st_mtime_ns == before
    assert store.folder.parent.stat().st_mode & 0o077 == 0
    assert sorted(p.name for p in store.folder.parent.iterdir()) == [".lock", "copy"]


def test_a_copy_with_a_missing_file_is_made_again(store, model):
    (store.folder / EXPERT).unlink()
    assert HostStore.create(model, store.folder).read_experts([(1, 3)])
    assert not (store.folder / "damaged").exists()


def test_a_missing_file_is_not_reported_as_a_damaged_one(store):
    path = store.folder / EXPERT
    content = path.read_bytes()
    path.write_bytes(content[:50])
    with pytest.raises(StoreCorrupt, match=r"expert 3 of MoE layer 1 is corrupt.*down/c/1/3/0/0"):
        store.read_experts([(1, 3)])
    path.write_bytes(content[:20] + bytes([content[20] ^ 4]) + content[21:])
    with pytest.raises(StoreCorrupt, match=r"expert 3 of MoE layer 1 in .* is corrupt: CRC-32"):
        store.read_experts([(1, 3)])
    path.unlink()
    with pytest.raises(StoreMissing, match=r"expert 3 of MoE layer 1 is missing.*down/c/1/3/0/0"):
        store.read_experts([(1, 3)])
    path.write_bytes(content)
    assert store.read_experts([(1, 3)])


def test_damage_outside_the_experts_is_named_with_its_chunk(tmp_path):
    published_folder(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "m", on_progress=lambda done, total: None)
    path = tmp_path / "m" / "params/state/segments.0.0.qkv/c/2/0/0"
    content = path.read_bytes()
    path.write_bytes(content[:20] + bytes([content[20] ^ 4]) + content[21:])
    with pytest.raises(StoreCorrupt, match=r"tensor segments\.0\.0\.qkv in .* corrupt: CRC-32 differs, chunks \[2\]"):
        HostStore.open(tmp_path / "m").non_expert_params()
    path.write_bytes(content[:100])
    with pytest.raises(StoreCorrupt, match=r"tensor segments\.0\.0\.qkv is corrupt.*qkv/c/2/0/0"):
        HostStore.open(tmp_path / "m").non_expert_params()
    path.unlink()
    with pytest.raises(StoreMissing, match=r"tensor segments\.0\.0\.qkv is missing"):
        HostStore.open(tmp_path / "m").non_expert_params()


@pytest.mark.parametrize("in_flight", [0, 3000, 1 << 30])
def test_how_many_reads_are_under_way_changes_nothing(store, model, monkeypatch, in_flight):
    monkeypatch.setattr(store_module, "IN_FLIGHT", in_flight)
    wanted = [(layer, e) for layer in range(2) for e in range(8)]
    experts = load_params(model).segments[0][2].moe.experts
    for (layer, e), (gate_up, _) in store.read_experts(wanted).items():
        np.testing.assert_array_equal(gate_up, experts.gate_up[layer, e])


def test_an_error_names_all_that_failed_and_the_others_can_be_read(store):
    (store.folder / EXPERT).unlink()
    wanted = [(0, 0), (1, 3), (1, 4)]
    with pytest.raises(StoreError) as caught:
        store.read_experts(wanted)
    assert list(caught.value.failed) == [(1, 3)]
    assert len(store.read_experts(e for e in wanted if e not in caught.value.failed)) == 2


def test_a_lost_tensor_and_an_expert_that_never_was_are_missing(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "m")
    shutil.rmtree(folder / "params/state/segments.0.2.moe.experts.gate_up")
    with pytest.raises(StoreMissing, match="is missing"):
        HostStore.open(folder).read_experts([(0, 0)])
    with pytest.raises(StoreMissing, match="has no expert 8 in MoE layer 0: it has 8"):
        HostStore.open(model).read_experts([(0, 8)])
    shutil.rmtree(folder / "params/state/embed")
    with pytest.raises(StoreMissing, match="tensor embed is missing"):
        HostStore.open(folder).non_expert_params()


def test_a_folder_others_may_write_to_is_refused(model, tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(StoreRefused, match=r"mode drwxrwxrwx; it must be a folder of user"):
        HostStore.create(model, tmp_path / "open" / "copy")
    (tmp_path / "link").symlink_to(tmp_path / "open")
    with pytest.raises(StoreRefused):
        HostStore.create(model, tmp_path / "link" / "copy")


def test_without_room_the_model_folder_is_the_store(model, tmp_path, monkeypatch):
    monkeypatch.setattr(host_copies.shutil, "disk_usage", lambda _: SimpleNamespace(free=0, total=0))
    with pytest.warns(UserWarning, match="has room for 0 MiB"):
        store = HostStore.create(model, tmp_path / "host" / "copy")
    assert store.folder == model
    assert store.read_experts([(0, 0)])


def test_a_folder_that_is_no_store_says_so(tmp_path, model):
    shutil.copy(model / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"checksums\.json does not exist"):
        HostStore.open(tmp_path)


def test_reading_starts_no_jax_backend(store):
    program = (
        "import sys; from pathlib import Path; from moejax.checkpoint.host_store import HostStore\n"
        "store = HostStore.open(Path(sys.argv[1]))\n"
        "store.non_expert_params(); store.read_experts([(0, 0)])\n"
        "from jax._src import xla_bridge; assert not xla_bridge._backends, xla_bridge._backends"
    )
    subprocess.run([sys.executable, "-c", program, str(store.folder)], check=True, timeout=120)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_lie_where_a_device_takes_them_as_they_are(store, dtype):
    for array in jax.tree.leaves(store.non_expert_params(dtype)):
        assert array.dtype == dtype
        assert array.ctypes.data % ALIGNMENT == 0


@pytest.mark.parametrize("whole", [True, False], ids=["whole tensor", "expert"])
def test_the_advice_names_the_folder_that_is_damaged(tmp_path, whole):
    source, copy = tmp_path / "model", tmp_path / "host" / "copy"
    model_folder(source, SHARED, np.float16)
    store = HostStore.create(source, copy)
    damaged = "params/state/segments.0.0.qkv/c/0/0/0" if whole else EXPERT

    def read(store: HostStore) -> None:
        if whole:
            store.non_expert_params()
        else:
            store.read_experts([(1, 3)])

    (copy / damaged).write_bytes(b"")
    with pytest.raises(StoreCorrupt, match=f"Delete {copy}; the next start copies it again from {source}\\."):
        read(store)
    (source / damaged).write_bytes(b"")
    with pytest.raises(StoreCorrupt, match=f"folder {source}, .*is damaged: make it again, then delete {copy}\\."):
        read(store)
    with pytest.raises(StoreCorrupt, match=f"The model folder {source} is damaged: make it again\\."):
        read(HostStore.open(source))
