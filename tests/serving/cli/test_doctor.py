"""The checks of `moejax doctor`, each on values that can be worked out by hand."""

import json
import socket

import pytest
from click.testing import CliRunner

from serving.cli import doctor, main
from serving.config import Settings


def test_a_port_in_use_is_a_problem_with_its_flag():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        found = doctor.check_port("127.0.0.1", number, "--http-port")
    assert found.state == "problem"
    assert "--http-port" in found.advice
    assert doctor.check_port("127.0.0.1", number, "--http-port").state == "ok"


def test_too_little_memory_names_the_ranks_that_fit():
    found = doctor.check_memory(3 * doctor.MEMORY_PER_RANK, 4)
    assert (found.state, "--ranks 3" in found.advice) == ("problem", True)
    assert doctor.check_memory(4 * doctor.MEMORY_PER_RANK, 4).state == "ok"


@pytest.mark.parametrize(
    ("settings", "state"),
    [
        ({}, "ok"),
        ({"host": "0.0.0.0"}, "warning"),
        ({"host": "0.0.0.0", "api_keys": "k"}, "warning"),
        ({"host": "0.0.0.0", "api_keys": "k", "tls_cert": "c", "tls_key": "k"}, "ok"),
        ({"host": "::1"}, "ok"),
    ],
)
def test_an_open_server_is_warned_of(settings, state):
    assert doctor.check_exposure(Settings(**settings)).state == state


def test_every_finding_that_is_not_ok_says_what_to_do(tmp_path):
    found = [
        doctor.check_python((3, 10)),
        doctor.check_memory(0, 4),
        doctor.check_host_store(tmp_path / "none"),
        doctor.check_cores(1, 2),
        doctor.check_open_files(10),
    ]
    assert all(f.state != "ok" and f.advice for f in found)


def test_jax_is_asked_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(doctor, "_DEVICES", "import json; print(json.dumps([['cpu', 'cpu'], ['cpu', 'cpu']]))")
    assert doctor.check_devices().text == "2 devices: cpu (cpu)"
    monkeypatch.setattr(doctor, "_DEVICES", "raise RuntimeError('no device')")
    assert doctor.check_devices().state == "problem"
    assert "no device" in doctor.check_devices().text


def test_the_command_prints_every_check_and_fails_when_one_does(monkeypatch):
    monkeypatch.setattr(
        doctor, "check_devices", lambda: doctor.Finding(name="jax", state="problem", text="t", advice="a")
    )
    result = CliRunner().invoke(main.main, ["doctor", "--json", "--grpc-port", "0", "--http-port", "0"])
    found = [json.loads(line) for line in result.output.splitlines()]
    assert result.exit_code == 1
    assert {f["name"] for f in found} >= {"python", "packages", "memory", "tmpfs", "cache", "cores", "jax"}


def test_where_ranks_dial_in_is_looked_at_when_they_do(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "check_devices", lambda: doctor.Finding(name="jax", state="ok", text="t"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        here = {"grpc_port": 0, "http_port": 0, "rank_listen": f"127.0.0.1:{port}"}
        for launcher, state in (("local", None), ("ray", "problem")):
            found = {f.name: f for f in doctor.run_checks(Settings(launcher=launcher, **here), tmp_path)}
            at = found.get(f"port {port}")
            assert (at and at.state) == state
