"""The folder that a supervisor and its fronts share."""

import os

from serving.launch.run_folder import RunFolder


def test_the_next_front_gets_the_ports_of_the_last_one_that_was_ready(tmp_path):
    run = RunFolder(tmp_path)
    assert run.ports == {}
    assert not run.was_ready(os.getpid())
    run.announce(http_port=8000, grpc_port=50051)
    assert RunFolder(tmp_path).ports == {"http_port": 8000, "grpc_port": 50051}
    assert run.was_ready(os.getpid())
    assert not run.was_ready(os.getpid() + 1)


def test_fronts_are_numbered(tmp_path):
    assert [RunFolder(tmp_path).next_front() for _ in range(3)] == [0, 1, 2]


def test_a_front_is_supervised_when_its_environment_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("MOEJAX_LINK_RUN", raising=False)
    assert RunFolder.of_this_front() is None
    monkeypatch.setenv("MOEJAX_LINK_RUN", str(tmp_path))
    assert RunFolder.of_this_front() == RunFolder(tmp_path)
