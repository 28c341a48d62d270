"""Join tokens: made once, kept as hashes in a file of their owner, and counted until they end."""

import os

import pytest

from serving.auth.api_keys import ApiKeyFile
from serving.auth.join_tokens import JoinTokenFileError, JoinTokens, read_secret
from serving.errors import InvalidRequest

NOW = 4e9  # seconds since the epoch, far off


def test_a_secret_counts_for_as_long_as_it_was_made_for(tmp_path):
    tokens = JoinTokens(tmp_path / "tokens.json")
    for_ever, short = tokens.add("a"), tokens.add("b", valid_s=60)
    (ends,) = (token.expires for token in tokens.entries() if token.name == "b")
    assert ends is not None
    assert tokens.rejection(for_ever, NOW) is None
    assert tokens.rejection(short, ends - 1) is None
    assert "expired" in (tokens.rejection(short, ends) or "")
    assert "no join token" in (tokens.rejection(for_ever[:-1], NOW) or "")
    tokens.remove("a")
    assert "no join token" in (tokens.rejection(for_ever, NOW) or "")


def test_the_file_holds_no_secret_and_is_its_owners_alone(tmp_path):
    path = tmp_path / "tokens.json"
    secret = JoinTokens(path).add("a")
    assert secret not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["tokens.json"]
    for mode in (0o660, 0o604):
        path.chmod(mode)
        with pytest.raises(JoinTokenFileError, match=rf"mode {mode:o}.*chmod 600"):
            JoinTokens.open(path)


def test_api_keys_and_join_tokens_are_never_taken_for_each_other(tmp_path):
    key = ApiKeyFile(tmp_path / "keys.json").add("a", admin=True)
    secret = JoinTokens(tmp_path / "tokens.json").add("a")
    assert JoinTokens.open(tmp_path / "tokens.json").rejection(key, NOW) is not None
    assert ApiKeyFile.open(tmp_path / "keys.json").find(secret) is None
    with pytest.raises(JoinTokenFileError, match="no file of join tokens"):
        JoinTokens.open(tmp_path / "keys.json")


@pytest.mark.parametrize("mode", [0o604, 0o620, 0o602])
def test_a_secret_that_others_can_read_is_not_used(tmp_path, mode):
    path = tmp_path / "token"
    path.write_text(JoinTokens(tmp_path / "tokens.json").add("a") + "\n")
    path.chmod(0o440)  # as Kubernetes gives it to a pod's group
    assert read_secret(path).startswith("mjr_")
    path.chmod(mode)
    with pytest.raises(JoinTokenFileError, match="chmod 600"):
        read_secret(path)


def test_a_missing_file_and_a_name_in_use_are_errors_with_a_way_out(tmp_path):
    tokens = JoinTokens(tmp_path / "tokens.json")
    with pytest.raises(JoinTokenFileError, match="moejax tokens add"):
        JoinTokens.open(tokens.path)
    tokens.add("a")
    with pytest.raises(InvalidRequest, match="already"):
        tokens.add("a")
    with pytest.raises(InvalidRequest, match="the tokens are: a"):
        tokens.remove("b")
