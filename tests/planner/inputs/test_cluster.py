"""Cluster files: presets load, sizes are applied, wrong keys and values are named."""

from __future__ import annotations

import pytest

from planner import Cluster, Hardware, InputError
from planner.inputs.cluster import PRESETS, read_cluster


@pytest.mark.parametrize("name", sorted(p.stem for p in PRESETS.glob("*.toml")))
def test_every_preset_loads(name):
    cluster = read_cluster(name)
    assert len(cluster.devices) == cluster.per_host >= 4
    assert cluster.hardware.memory_bytes > 1e9


def test_presets_cover_the_hardware_people_have():
    assert {"h100", "h200", "b200", "v5e", "v5p", "v6e", "cpu"} <= {p.stem for p in PRESETS.glob("*.toml")}


def test_a_preset_can_be_given_a_size():
    cluster = read_cluster("h200:40x8")
    assert len(cluster.devices) == 320
    assert cluster.per_host == 8
    assert len(cluster.domains("host")) == 40
    assert len(cluster.domains("rack")) == 10
    assert len(cluster.domains("rank")) == 320


def test_a_free_description_mixes_hosts_and_overrides_a_preset(tmp_path):
    file = tmp_path / "ours.toml"
    file.write_text(
        'name = "ours"\n[hardware]\npreset = "h100"\nmemory_bytes = 96_000_000_000\n'
        "[[hosts]]\ncount = 2\ndevices = 8\nhosts_per_rack = 2\n[[hosts]]\ncount = 1\ndevices = 4\n"
    )
    cluster = read_cluster(str(file))
    assert len(cluster.devices) == 20
    assert cluster.hardware.memory_bytes == 96_000_000_000
    assert cluster.hardware.link_bandwidth == read_cluster("h100").hardware.link_bandwidth
    file.write_text('[[devices]]\nid = 4\nhost = "b"\n[[devices]]\nid = 1\nhost = "a"\nrack = "r"\n')
    assert read_cluster(str(file)).ids == (1, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nme = 1", "unknown key 'nme' .* Did you mean 'name'"),
        ("[hardware]\nmemory_byte = 1", "Did you mean 'memory_bytes'"),
        (
            "[hardware]\nflops = -1\n[[hosts]]\ncount=1\ndevices=1",
            r"cluster\.toml: .*flops is -1, it must be a number above 0",
        ),
        ("[hardware]\npreset = 'h2'", "Did you mean 'h200'|Did you mean 'b200'|Did you mean"),
        ("[[hosts]]\ncount = 0\ndevices = 8", "count is 0, it must be a whole number of at least 1"),
        ("[[hosts]]\ncount = 1\ndevice = 8", "unknown key 'device' .* Did you mean 'devices'"),
        ("name = 'empty'", "has no devices"),
        ("[[devices]]\nid = 1\nhost = 'a'\n[[devices]]\nid = 1\nhost = 'b'", "without repeats"),
        ("= 1", "is not TOML"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, message):
    file = tmp_path / "cluster.toml"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        read_cluster(str(file))


def test_an_unknown_cluster_lists_the_presets():
    with pytest.raises(InputError, match=r"neither a file nor a preset .*presets are a100, b200, .*Did you mean"):
        read_cluster("z900")


def test_ids_hosts_and_values_are_checked():
    with pytest.raises(InputError, match="2 hosts named for 3 ranks"):
        Cluster.local(3, hosts=["a", "b"])
    with pytest.raises(InputError, match="memory_bandwidth is 0"):
        Hardware(memory_bandwidth=0)
    with pytest.raises(InputError, match="none of rank, host, rack"):
        Cluster.local(2).domains("room")
