"""Prompts and decode apart, on a real server: the tokens of collocated ranks, whichever rank or pool is lost."""

import os
import signal
from collections.abc import Iterator

import pytest

from serving.api.client import Client
from serving.errors import Cancelled, InvalidRequest
from serving.protocol.sampling import StructuredOutputs
from serving.server import Server
from tests.e2e.conftest import FEW_BUCKETS, TINY
from tests.support.processes import supervised
from tests.support.streams import Traffic, kill, wait_until, wait_until_whole

PREFILL, DECODE = (0, 1), (2, 3)


@pytest.fixture(scope="module")
def pools() -> Iterator[Server]:
    """Two ranks for prompts and two that decode."""
    with Server(model=str(TINY), arch="pd", prefill=2, decode=2, buckets=FEW_BUCKETS, chaos=True) as server:
        yield server


@pytest.fixture
def client(pools: Server) -> Iterator[Client]:
    """A client, once all ranks serve; nothing may be compiled, and nothing is left behind."""
    with Client(pools) as client:
        wait_until_whole(client)
        compiles = client.status().compiles_after_ready
        yield client
        wait_until(lambda: client.status().running + client.status().waiting == 0, "all requests have ended")
        assert client.status().compiles_after_ready == compiles
        assert all(rank.pages_used == 0 for rank in client.status().ranks if rank.state == "serving")


def test_they_say_what_collocated_ranks_say(client: Client, traffic: Traffic) -> None:
    before = client.status()
    traffic.during(client)
    after = client.status()
    assert after.requests_sent - before.requests_sent == len(traffic.known)
    assert [pool.name for pool in after.pools] == ["prefill", "decode"]
    assert [rank.role for rank in after.ranks] == ["prefill"] * 2 + ["decode"] * 2


def slow(*values: object) -> object:
    """Parameters of the slow tests: a pool that is lost at the other time."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("rank", "after"), [(PREFILL[0], 0.0), (DECODE[1], 0.3), slow(PREFILL[0], 0.3), slow(DECODE[1], 0.0)]
)
def test_the_loss_of_a_rank_of_either_pool_changes_no_token(
    client: Client, traffic: Traffic, rank: int, after: float
) -> None:
    traffic.during(client, kill(client, rank), after=after)


def test_a_stopped_rank_of_either_pool_changes_no_token(client: Client, traffic: Traffic) -> None:
    traffic.during(client, kill(client, PREFILL[1], signal.SIGSTOP), kill(client, DECODE[0], signal.SIGSTOP))


MIXED = (*PREFILL[:1], *DECODE[1:])


@pytest.mark.parametrize(
    ("side", "after"),
    [(PREFILL, 0.0), (DECODE, 0.3), slow(MIXED, 0.3), slow(PREFILL, 0.3), slow(DECODE, 0.0), slow(MIXED, 0.0)],
)
def test_the_other_pool_takes_over_from_one_that_died(
    client: Client, traffic: Traffic, side: tuple[int, ...], after: float
) -> None:
    acts = [kill(client, rank) for rank in side]
    traffic.during(client, *acts, after=after)
    traffic.during(client)


LONG = [(11 * i) % 500 + 5 for i in range(400)]


def test_answers_scores_grammars_and_drafts_are_those_of_collocated_ranks(client: Client, whole: Client) -> None:
    grammar = StructuredOutputs("regex", "[ab]{4,8}")
    for options in (
        {"n": 3, "temperature": 1.0, "seed": 7, "max_tokens": 20},
        {"temperature": 0.0, "max_tokens": 12, "top_logprobs": 2, "prompt_logprobs": 1},
        {
            "temperature": 1.0,
            "seed": 3,
            "max_tokens": 12,
            "structured_outputs": grammar,
        },
        {"temperature": 0.0, "max_tokens": 30, "speculate": True},
    ):
        apart, together = (each.generate_all(LONG, **options) for each in (client, whole))
        for one, other in zip(apart, together, strict=True):
            assert (one.token_ids, one.logprobs, one.top) == (other.token_ids, other.logprobs, other.top)
            assert one.prompt_logprobs == other.prompt_logprobs


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_request_is_cancelled_in_either_pool(client: Client, tokens: int) -> None:
    def read() -> None:
        for chunk in client.stream(LONG, max_tokens=100, ignore_eos=True, request_id="left"):
            if chunk.index >= tokens - 1:
                client.abort("left")

    with pytest.raises(Cancelled):
        read()


def test_a_rank_of_either_pool_is_drained_and_comes_back(client: Client, traffic: Traffic) -> None:
    for rank in (PREFILL[0], DECODE[0]):
        traffic.during(client, lambda rank=rank: client.apply("drain", rank, replace=True))
        wait_until_whole(client)


def test_instructions_about_both_pools_are_refused(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="both pools"):
        client.apply("drain", PREFILL[0], DECODE[0])
    with pytest.raises(InvalidRequest, match="two pools"):
        client.apply("scale_down", to=3)
    with pytest.raises(InvalidRequest, match="Restart"):
        client.apply("weights", model=str(TINY))


@pytest.mark.parametrize("ranks", [(1,), slow((0, 1))], ids=str)
def test_a_front_that_dies_alone_or_with_a_rank_costs_a_pause(traffic: Traffic, ranks: tuple[int, ...]) -> None:
    options = ("--arch", "pd", "--prefill", "1", "--decode", "1", "--edges", "0", "--kv-cache-type", "float32")
    with supervised(*options) as server, Client(server.address) as client:
        wait_until_whole(client)
        before = [rank.pid for rank in client.status().ranks]
        with_ranks = (lambda rank=rank: server.kill_with(client, rank) for rank in ranks)
        for act in (lambda: os.kill(server.front(), signal.SIGKILL), *with_ranks):
            traffic.during(client, act, after=0.2)
            wait_until_whole(client)
            assert client.status().compiles_after_ready == 0
        assert before[1] != client.status().ranks[1].pid
