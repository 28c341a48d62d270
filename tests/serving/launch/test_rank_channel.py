"""How a machine reaches the front: a rank opens the channel that its host agent has."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.auth.tls import ClientTls
from serving.launch.rank_channel import RankChannel, local_address_towards
from serving.launch.rank_process import ENV_FRONT

NAMES = st.text("abcxyz./-0", min_size=1, max_size=12)
PATHS = NAMES.map(Path)
PAIRS = st.none() | st.tuples(PATHS, PATHS)
TLS = st.builds(
    lambda ca, pair: ClientTls(ca=ca, cert=pair[0] if pair else None, key=pair[1] if pair else None),
    st.none() | PATHS,
    PAIRS,
)


@given(front=NAMES, address=NAMES, tls=st.none() | TLS.filter(lambda tls: tls.ca or tls.cert))
def test_a_rank_opens_the_channel_of_the_agent_that_starts_it(front: str, address: str, tls: ClientTls | None) -> None:
    channel = RankChannel(front=front, address=address, tls=tls)
    assert RankChannel.from_environment({ENV_FRONT: front} | channel.variables()) == channel


def test_a_rank_without_an_address_is_on_the_fronts_own_machine() -> None:
    assert RankChannel.from_environment({ENV_FRONT: "unix:/link"}) == RankChannel(
        front="unix:/link", address="127.0.0.1"
    )


@pytest.mark.parametrize(
    ("address", "found"), [(":5000", "front.test:5000"), ("10.0.0.7:5000", "10.0.0.7:5000"), ("[::1]:1", "[::1]:1")]
)
def test_an_address_without_a_host_is_the_fronts(address: str, found: str) -> None:
    assert RankChannel(front="front.test:50052", address="127.0.0.1").with_host(address) == found


def test_the_address_towards_this_machine_is_loopback() -> None:
    assert local_address_towards("127.0.0.1:50052") == "127.0.0.1"
