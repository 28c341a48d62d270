"""Two processes use the newest version that both speak, and refuse each other with both numbers when there is none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import StartError
from serving.protocol.versions import PROTOCOLS, VersionRange, check_common

ranges = st.tuples(st.integers(1, 9), st.integers(0, 4)).map(lambda drawn: VersionRange(drawn[0], sum(drawn)))


def spoken(each: VersionRange) -> set[int]:
    return set(range(each.oldest, each.newest + 1))


@given(ranges, ranges)
def test_the_newest_version_that_both_speak_is_used(ours: VersionRange, theirs: VersionRange) -> None:
    both = spoken(ours) & spoken(theirs)
    assert ours.common_with(theirs) == theirs.common_with(ours) == max(both, default=None)


def test_versions_that_are_apart_are_refused_with_both_numbers() -> None:
    with pytest.raises(
        StartError, match=r"the edge speaks version 4 to 5 of the edge protocol.* version 3\. Upgrade\."
    ):
        check_common("edge", VersionRange(3, 3), VersionRange(4, 5), who="the edge", way_out="Upgrade.")


def test_every_protocol_has_a_version() -> None:
    assert {"link", "edge", "journal"} <= PROTOCOLS.keys()
    assert all(1 <= each.oldest <= each.newest for each in PROTOCOLS.values())
