"""Settings: one default each, three sources, and what is refused."""

import ast
import dataclasses
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import serving
from serving.config import GROUPS, DetectionSettings, MeshSettings, Settings
from serving.errors import InvalidRequest


@pytest.mark.parametrize(
    ("given", "expected"),
    [("auto", "auto"), ("fp8_e4m3", "fp8"), ("int8_per_token_head", "int8"), ("bfloat16", "bfloat16")],
)
@pytest.mark.parametrize("name", ["kv_cache_type", "kv_cache_dtype"])
def test_the_type_of_the_cache_is_read_by_the_names_of_vllm_too(name, given, expected):
    for settings in (Settings.load(None, {}, **{name: given}), Settings.load(None, {f"MOEJAX_{name.upper()}": given})):
        assert settings.kv_cache_type == expected
        assert settings.deprecations == ()


def test_a_type_of_the_cache_that_is_not_served_or_given_twice_is_refused():
    with pytest.raises(InvalidRequest, match=r"kv_cache_type is 'fp8_e5m2'\. Choose one of auto, float32, bfloat16"):
        Settings.load(None, {}, kv_cache_dtype="fp8_e5m2")
    with pytest.raises(InvalidRequest, match="kv_cache_dtype is 'fp8' and kv_cache_type is 'int8'"):
        Settings.load(None, {}, kv_cache_dtype="fp8", kv_cache_type="int8")
    assert Settings.load(None, {}, kv_cache_dtype="fp8_e4m3", kv_cache_type="fp8").kv_cache_type == "fp8"
    assert Settings.load(None, {}, kv_cache_dtype="fp8", kv_cache_type="fp8_e4m3").kv_cache_type == "fp8"


def test_every_setting_says_what_it_is_for():
    assert all(field.metadata["help"].endswith(".") for field in dataclasses.fields(Settings))


@given(
    ranks=st.integers(2, 64),
    chaos=st.booleans(),
    model=st.text(st.characters(blacklist_categories=["Cs"]), min_size=1),
    floor=st.floats(0.1, 100),
    buckets=st.lists(st.tuples(st.integers(1, 64), st.integers(0, 8)), min_size=1, max_size=4).map(tuple),
)
def test_settings_written_as_toml_are_read_back(tmp_path_factory, ranks, chaos, model, floor, buckets):
    settings = Settings(ranks=ranks, chaos=chaos, model=model, heartbeat_floor_s=floor, buckets=buckets)
    file = tmp_path_factory.mktemp("toml") / "s.toml"
    file.write_text(settings.to_toml())
    assert Settings.load(file, {}) == settings


@pytest.mark.parametrize("source", ["flag", "variable", "file", "written"])
def test_buckets_may_be_left_to_what_is_counted(source, tmp_path):
    file = tmp_path / "s.toml"
    file.write_text(Settings(buckets=()).to_toml() if source == "written" else 'buckets = "auto"')
    settings = {
        "flag": lambda: Settings.load(None, {}, buckets="auto"),
        "variable": lambda: Settings.load(None, {"MOEJAX_BUCKETS": "auto"}),
        "file": lambda: Settings.load(file, {}),
        "written": lambda: Settings.load(file, {}),
    }[source]()
    assert settings.buckets == ()
    assert Settings().buckets == Settings.buckets != ()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MOEJAX_RANK": "3"}, "Did you mean MOEJAX_RANKS?"),
        ({"MOEJAX_HTTPPORT": "1"}, "Did you mean MOEJAX_HTTP_PORT?"),
        ({"MOEJAX_RANKS": "x"}, "'ranks' is 'x'"),
        ({"MOEJAX_CHAOS": "perhaps"}, "'chaos' is 'perhaps'"),
    ],
)
def test_a_wrong_variable_is_refused(environment, message):
    with pytest.raises(InvalidRequest, match=message.replace("?", r"\?")):
        Settings.load(None, environment)


def test_variables_that_are_no_settings_are_left_alone():
    foreign = {
        "MOEJAX_SERVICE_HOST": "10.0.0.1",
        "MOEJAX_SERVICE_PORT_HTTP": "8000",
        "MOEJAX_PORT": "tcp://10.0.0.1:8000",
        "MOEJAX_PORT_8000_TCP_ADDR": "10.0.0.1",
        "MOEJAX_API_KEY": "k",
        "MOEJAX_SERVER": "s",
        "OTHER_RANKS": "1",
    }
    assert Settings.load(None, foreign) == Settings()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"log_format": "xml"}, "Choose one of text, json"),
        ({"max_streams": 0}, "more than 0"),
        ({"tls_cert": "c"}, "without tls_key"),
        ({"tls_client_ca": "c"}, "without tls_cert"),
        ({"rank_tls_key": "k"}, "without rank_tls_cert"),
        ({"rank_tls_client_ca": "c"}, "without rank_tls_cert"),
        ({"rank_listen": "50052"}, "must be host:port"),
        ({"launcher": "join"}, "moejax tokens add"),
        ({"launcher": "join", "rank_tokens": "t", "rank_listen": "0.0.0.0:50052"}, "without TLS anybody on the way"),
        ({"launcher": "ray", "rank_listen": "10.0.0.1:50052"}, "without TLS anybody on the way"),
        ({"launcher": "ray", "ranks": 4, "hosts": 2}, "say themselves which host"),
        (
            {"speculate": "mtp", "arch": "disaggregated"},
            "arch is 'disaggregated' with speculate 'mtp'.*or speculate",
        ),
        ({"speculate": "mtp", "tensor": 2, "ranks": 4}, "tensor is 2 with speculate 'mtp': its layer is not sharded"),
        ({"launcher": "ray", "kv_replication": "memory"}, "Choose stream or off"),
        ({"ranks": 2.5}, "'ranks' is 2.5"),
        ({"chaos": 3}, "'chaos' is 3"),
        ({"model": 3}, "'model' is 3"),
    ],
)
def test_what_makes_no_sense_is_refused(values, message):
    with pytest.raises(InvalidRequest, match=message):
        Settings.load(None, {}, **values)


@pytest.mark.parametrize(
    "values",
    [
        {"launcher": "join", "rank_tokens": "t"},
        {"launcher": "join", "rank_tokens": "t", "rank_listen": "0.0.0.0:1", "rank_plaintext": True},
        {"launcher": "ray", "rank_listen": "0.0.0.0:1", "rank_tls_cert": "c", "rank_tls_key": "k"},
    ],
)
def test_ranks_elsewhere_are_let_in_on_loopback_over_tls_or_when_it_is_said_out_loud(values):
    assert Settings.load(None, {}, **values).launcher == values["launcher"]


@pytest.mark.parametrize("text", ["ranks = ", "\x00"])
def test_a_file_that_is_no_toml_is_one_error(tmp_path, text):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(InvalidRequest, match="not valid TOML"):
        Settings.load(file, {})


@pytest.mark.parametrize("source", ["flag", "variable", "file"])
@pytest.mark.parametrize(
    ("old", "value", "new", "now"),
    [
        ("protect_cache", "stream", "kv_replication", "stream"),
        ("dense", "whole", "dense", "replicated"),
        ("dense", "divided", "dense", "sharded"),
    ],
)
def test_names_of_the_release_before_are_accepted_with_a_note(source, old, value, new, now, tmp_path):
    file = tmp_path / "s.toml"
    file.write_text(f'{old} = "{value}"\n' if source == "file" else "")
    environment = {f"MOEJAX_{old.upper()}": value} if source == "variable" else {}
    settings = Settings.load(file, environment, **({old: value} if source == "flag" else {}))
    assert getattr(settings, new) == now
    (note,) = settings.deprecations
    assert value in note or old in note
    assert new in note
    file.write_text(settings.to_toml())
    assert Settings.load(file, {}).deprecations == ()


def test_the_later_source_wins_by_whatever_name(tmp_path):
    file = tmp_path / "s.toml"
    file.write_text('kv_replication = "off"\n')
    assert Settings.load(file, {"MOEJAX_PROTECT_CACHE": "memory"}).kv_replication == "memory"
    assert Settings.load(file, {"MOEJAX_PROTECT_CACHE": "memory"}, kv_replication="stream").kv_replication == "stream"


def test_the_settings_in_a_run_folder_of_0_1_0_are_read():
    """Written by `Settings.to_toml` of moejax 0.1.0, with a value for each setting."""
    old = Path(__file__).parent / "settings_of_0_1_0.toml"
    settings, written = Settings.load(old, {}), tomllib.loads(old.read_text())
    now = {"protect_cache": "kv_replication"}
    values = {"dense": "sharded", "buckets": ((4, 0), (4, 1))}
    for name, value in written.items():
        assert getattr(settings, now.get(name, name)) == values.get(name, value), name
    assert {now.get(name, name) for name in written} <= {field.name for field in dataclasses.fields(Settings)}


def test_the_groups_are_all_of_the_settings_and_share_none():
    names = [field.name for group in GROUPS for field in dataclasses.fields(group)]
    assert sorted(names) == sorted(field.name for field in dataclasses.fields(Settings))
    assert isinstance(Settings(), GROUPS)
    assert all(issubclass(Settings, group) for group in GROUPS)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_a_group_stands_alone_with_its_own_checks(group):
    assert dataclasses.asdict(group()).items() <= dataclasses.asdict(Settings()).items()


def test_a_group_checks_its_own_fields():
    with pytest.raises(InvalidRequest, match="hosts is 3 with 2 ranks"):
        MeshSettings(ranks=2, hosts=3)
    with pytest.raises(InvalidRequest, match="must be at least 0"):
        DetectionSettings(scrub_s=-1.0)


UNITS = {"seconds": "_s", "bytes": "_bytes"}


@pytest.mark.parametrize("field", dataclasses.fields(Settings), ids=lambda field: field.name)
def test_the_help_of_a_number_names_its_unit(field):
    text = field.metadata["help"]
    for unit, ending in UNITS.items():
        if field.name.endswith(ending):
            assert unit in text.lower()
    assert not re.search(r"\b(told|anew|those that|at hand)\b|^What\b(?! to do)", text)


READ_BY_CHECKS = {
    "hosts": "through `MeshSettings.host_of`",
    "rank_plaintext": "by `LaunchSettings.check`: it only permits what is refused otherwise",
}


class _Reads(ast.NodeVisitor):
    """Names of attributes that a program reads of something called settings."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load) and "settings" in ast.unparse(node.value).lower():
            self.names.add(node.attr)
        self.generic_visit(node)


def test_every_setting_is_read_by_something_other_than_the_settings():
    reads, package = _Reads(), Path(serving.__file__).parent
    for file in package.rglob("*.py"):
        if not file.is_relative_to(package / "config") and "proto" not in file.parts:
            reads.visit(ast.parse(file.read_text()))
    unread = {field.name for field in dataclasses.fields(Settings)} - reads.names
    assert unread == READ_BY_CHECKS.keys()
