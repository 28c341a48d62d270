"""Changed tensors that are sent to real processes under load: tokens are those of a server of a folder that has them,
whatever is killed meanwhile."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.weights import Load, broken_laws, kill, perturbed, wrong_tokens
from moejax.checkpoint.checkpoint import load_params
from moejax.config.params import named_tensors
from serving.api.client import Client
from serving.errors import InvalidRequest, MoejaxError
from serving.launch.weights_record import VERSIONS
from serving.server import Server
from tests.e2e.conftest import PAIR, TINY
from tests.e2e.test_weights import runs
from tests.support.processes import supervised
from tests.support.published import published_folder
from tests.support.streams import wait_until, wait_until_whole


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "tiny-1"
    perturbed(TINY, folder, 1)
    return folder


def tensors_of(folder: Path) -> list[tuple[str, np.ndarray]]:
    return list(named_tensors(load_params(folder, dtype=None)).items())


def versions_in(journal: Path) -> list[str]:
    return [each.name for each in (journal / VERSIONS).iterdir()]


def test_tokens_are_those_of_a_folder_with_the_changed_tensors_while_a_rank_is_killed(
    other: Path, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    with Server(**PAIR, chaos=True, journal=str(journal)) as server, Client(server) as client:
        wait_until_whole(client)
        first, *rest = tensors_of(other)
        with Load(server.address, 3, 40) as load:
            client.apply_tensors([first], version="a", base_version="0")
            timer = threading.Timer(1.0, kill, (server.address, 1))
            timer.start()
            client.apply_tensors(rest, version="b", base_version="a")  # a change of a change: all are those of `other`
            timer.join()
        assert not broken_laws(load.answers, ["0", "a", "b"])
        wait_until_whole(client)
        assert len(versions_in(journal)) == 1
        with pytest.raises(InvalidRequest, match=r"tensor embed has shape \[2\], and that of the served model"):
            client.apply_tensors([("embed", np.zeros(2, first[1].dtype))])
        assert len(versions_in(journal)) == 1
        assert client.status().failed == client.status().compiles_after_ready == 0
        client.apply("weights", model=str(other), version="b again")
        assert versions_in(journal) == []
        assert not wrong_tokens(client, runs(load.answers, "b")), "tokens differ from those of the folder"
        client.apply_tensors([first], version="last")
    with Server(**PAIR, journal=str(journal)) as server, Client(server) as client:
        assert client.status().weights_version == "last", "the version outlives the server"
        assert not wrong_tokens(client, runs(load.answers, "b")), "the folder has these tensors already"


def test_an_edge_takes_tensors_of_a_published_folder_and_a_killed_front_leaves_old_or_new(tmp_path: Path) -> None:
    base, changed = tmp_path / "mixtral", tmp_path / "changed"
    old = published_folder(base)
    new = published_folder(changed, seed=1)
    file = tmp_path / "changed.safetensors"
    save_file(new, file)
    ask = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    with Server(model=str(changed), ranks=2) as server, Client(server) as client:
        expected = client.generate([3, 4, 5], **ask).token_ids
    with supervised("--ranks", "2", "--operate", "--model", str(base)) as server, Client(server.address) as client:
        wait_until_whole(client)
        before = client.generate([3, 4, 5], **ask).token_ids
        assert before != expected
        name = sorted(old)[0]
        timer = threading.Timer(2.0, lambda: os.kill(server.front(), signal.SIGKILL))
        timer.start()
        with contextlib.suppress(MoejaxError):  # the front dies: either version is possible
            client.apply_tensors([(name, old[name])], version="same")
        timer.join()
        wait_until_whole(client)
        wait_until(lambda: not client.status().next_weights_version, "nothing is under way")
        assert client.status().weights_version in ("0", "same")
        assert client.generate([3, 4, 5], **ask).token_ids == before
        command = [sys.executable, "-m", "serving", "apply", "weights", "--tensors", str(file), "--version", "new"]
        said = subprocess.run([*command, "--server", server.address], check=True, capture_output=True, text=True).stdout
        assert "weights in force: version new" in said
        assert client.generate([3, 4, 5], **ask).token_ids == expected
