"""Prefix caching of a model whose layers have a state: prompts begin from snapshots, and no token changes."""

import os
import shutil
import signal
from collections.abc import Iterator

import pytest

from moejax.checkpoint.download import cache_folder
from serving.api.client import Client
from serving.api.client.completion import CompletionOutput
from tests.support.families.answers import ANSWER, recorded
from tests.support.families.small import small_folder
from tests.support.processes import Supervised, supervised
from tests.support.streams import Stream, Traffic, wait_until, wait_until_whole

FAMILY = "nemotron_h"
PAGE = 32


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervised]:
    """Two ranks of a small Nemotron-H under a supervisor."""
    folder = tmp_path_factory.mktemp("model") / f"small-{FAMILY}"
    small_folder(folder, FAMILY)
    arguments = ("--model", str(folder), "--ranks", "2", "--buckets", "2,2", "--edges", "0", "--state-snapshots", "6")
    with supervised(*arguments, "--kv-cache-type", "float32") as server:
        yield server
    for converted in (cache_folder() / "models").glob(f"{folder.name}-*"):
        shutil.rmtree(converted)


def ask(client: Client, prompt: list[int], count: int = ANSWER) -> CompletionOutput:
    return client.generate(prompt, max_tokens=count, temperature=0.0, ignore_eos=True)


def computed(client: Client, prompt: list[int], count: int) -> tuple[int, ...]:
    """The answer to a prompt that is computed from its beginning: its tokens are to be scored."""
    output = client.generate(prompt, max_tokens=count, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
    assert output.cached_tokens == 0
    return output.token_ids


def kill_who_serves(client: Client) -> None:
    """SIGKILL to the rank that has the request."""
    (pid,) = [rank.pid for rank in client.status().ranks if rank.running]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def test_a_prompt_and_the_next_turn_begin_from_snapshots_with_the_tokens_of_transformers(server: Supervised) -> None:
    expected = recorded(FAMILY)
    with Client(server.address) as client:
        wait_until_whole(client)
        answers = [ask(client, expected.prompt) for _ in range(2)]
        assert [list(each.token_ids) for each in answers] == [expected.tokens] * 2
        assert [each.cached_tokens for each in answers] == [0, PAGE]
        turn = [*expected.prompt, *expected.tokens, 7, 8, 9]
        answer = ask(client, turn, 30)
        assert answer.cached_tokens == (len(turn) - 4) // PAGE * PAGE == 3 * PAGE
        assert answer.token_ids == computed(client, turn, 30)
        status = client.status()
        assert status.compiles_after_ready == 0
        assert {rank.snapshots for rank in status.ranks} == {6}
        assert sum(rank.snapshots_used for rank in status.ranks) >= 3
        assert status.prefix_hits == 4 * PAGE


def test_a_request_that_began_from_a_snapshot_keeps_its_tokens_when_its_rank_dies(server: Supervised) -> None:
    with Client(server.address) as client:
        wait_until_whole(client)
        prompt = list(range(40, 115))
        known = Stream(prompt, 0.0, 0, ANSWER)
        known.run(client)
        assert tuple(known.tokens) == computed(client, prompt, ANSWER)
        for _ in range(3):
            wait_until_whole(client)
            assert ask(client, prompt, 1).cached_tokens == 2 * PAGE
            (killed,) = Traffic([known]).during(client, lambda: kill_who_serves(client))
            if len(set(killed.epochs)) > 1:
                break
        assert len(set(killed.epochs)) > 1, "its rank was killed on the way"
        wait_until_whole(client)
        assert client.status().compiles_after_ready == 0


def test_the_next_front_finds_the_snapshots_of_the_ranks(server: Supervised) -> None:
    with Client(server.address) as client:
        wait_until_whole(client)
        prompt = list(range(70, 145))
        first = ask(client, prompt)
        wait_until(lambda: not any(rank.running for rank in client.status().ranks), "nothing runs")
        ask(client, list(range(5)), 3)  # by then the rank knows of the last snapshots
        pids = [rank.pid for rank in client.status().ranks]
        os.kill(server.front(), signal.SIGKILL)
        wait_until_whole(client)
        assert [rank.pid for rank in client.status().ranks] == pids
        second = ask(client, prompt)
        assert (second.cached_tokens, second.token_ids) == (2 * PAGE, first.token_ids)
        turn = [*prompt, *first.token_ids, 5]
        assert ask(client, turn, 9).cached_tokens >= 4 * PAGE
        assert client.status().compiles_after_ready == 0
