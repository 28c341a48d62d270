"""A file of hashed secrets is replaced atomically, and only its owner can read it."""

import dataclasses
import os

import pytest

from serving.auth import secret_file
from serving.auth.secret_file import hash_secret, write_entries


@dataclasses.dataclass(frozen=True)
class Entry:
    name: str


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "secrets.json"
    write_entries(path, "keys", [Entry("a")])
    before = path.read_text()
    monkeypatch.setattr(secret_file.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(OSError, match="no space"):
        write_entries(path, "keys", [Entry("b")])
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["secrets.json"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_secret_of_any_bytes_has_a_hash():
    assert len(hash_secret("é\udcff")) == 64
