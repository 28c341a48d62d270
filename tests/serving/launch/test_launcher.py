"""The launcher that settings ask for."""

import dataclasses
import secrets

import pytest

from serving.auth.join_tokens import PREFIX, JoinTokens
from serving.config import Settings
from serving.errors import StartError
from serving.launch import launcher
from serving.launch.host_pool import HostPool
from serving.launch.launcher import Launcher, _token_check
from serving.launch.rank_process import LocalStarter
from serving.launch.run_folder import RunFolder
from serving.launch.supervised import SupervisedStarter
from tests.support.joining import JOINED_MODEL


@pytest.mark.parametrize(
    ("name", "supervised", "starter"),
    [("local", False, LocalStarter), ("local", True, SupervisedStarter), ("join", False, HostPool)],
)
def test_the_setting_of_heartbeats_reaches_the_listener_of_every_launcher(tmp_path, name, supervised, starter):
    tokens = JoinTokens(tmp_path / "tokens.json")
    tokens.add("hosts")
    joined = {"launcher": "join", "rank_tokens": str(tokens.path)} if name == "join" else {}
    settings = Settings(heartbeat_s=0.125, **joined)
    made = Launcher.of(settings, JOINED_MODEL, tmp_path, RunFolder(tmp_path) if supervised else None)
    assert isinstance(made.starter, starter)
    assert made.listener.heartbeat_s == 0.125
    assert made.listener.stream_metadata == (("moejax-heartbeat-s", "0.125"),)


def test_hosts_prepare_the_model_with_the_cache_format_of_the_front(tmp_path):
    tokens = JoinTokens(tmp_path / "tokens.json")
    tokens.add("hosts")
    model = dataclasses.replace(JOINED_MODEL, cache_format="int8")
    made = Launcher.of(Settings(launcher="join", rank_tokens=str(tokens.path)), model, tmp_path)
    assert made.host_pool is not None
    assert made.host_pool._prepare.prepare.kv_cache_type == "int8"


def test_the_secret_of_this_server_and_tokens_of_its_file_are_valid(tmp_path):
    tokens = JoinTokens(tmp_path / "tokens.json")
    token, secret = tokens.add("hosts"), PREFIX + secrets.token_urlsafe(32)
    with_file = Settings(launcher="join", rank_tokens=str(tokens.path))
    check = _token_check(with_file, secret)
    assert (check(secret, 0.0), check(token, 0.0)) == (None, None)
    assert "no join token" in (check("", 0.0) or "")
    assert "no join token" in (_token_check(with_file, "")("", 0.0) or ""), "no secret is not an empty secret"
    assert "no join token" in (_token_check(Settings(), secret)(token, 0.0) or "")


def test_ray_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name}", name="ray")

    monkeypatch.setattr(launcher.importlib, "import_module", missing)
    with pytest.raises(StartError, match=r"pip install -e '\.\[ray\]'"):
        Launcher.of(Settings(launcher="ray"), JOINED_MODEL, tmp_path)
