"""The versions of what processes of one server say to each other, and of what one of them writes for the next.

Code names the range that it speaks, and an upgrade to code that has no version in common is refused. Ranks and edges
name theirs when they connect, and both sides use the newest common version; the journal and requests to the supervisor
carry no number. Raise the
newest number when a message changes so that an older reader would misunderstand it; raise the oldest one when this code
no longer speaks an earlier version. A field with a default that older readers ignore needs neither.
"""

import dataclasses
from collections.abc import Mapping
from typing import Self

from serving.errors import StartError


@dataclasses.dataclass(frozen=True)
class VersionRange:
    """The versions of one protocol that a process speaks, both ends included."""

    oldest: int
    newest: int

    def common_with(self, other: Self) -> int | None:
        """The newest version that both speak; None when they have none in common."""
        newest = min(self.newest, other.newest)
        return newest if newest >= max(self.oldest, other.oldest) else None

    def __str__(self) -> str:
        return str(self.newest) if self.oldest == self.newest else f"{self.oldest} to {self.newest}"


LINK = VersionRange(1, 3)
"""Messages between the front and ranks, and the exchange between ranks. Version 2 has steps after which the layer of
multi-token prediction does not run; while a rank speaks version 1 only, it runs after all of them. Version 3 has
snapshots of states; a rank of an older version cannot be part of a server that keeps some."""
SKIPS_DRAFTS = 2
"""The version of LINK that has `Step.skip_drafts`."""
KEEPS_SNAPSHOTS = 3
"""The version of LINK that has `Configure.snapshots`."""
HOST = VersionRange(1, 2)
"""Messages between the front and host agents that pass on those of their ranks. Version 2 has snapshots of states; the
ranks of an agent of version 1 speak a version of LINK without."""
EDGE = VersionRange(1, 1)
"""Messages between edges and the front."""
JOURNAL = VersionRange(1, 1)
"""Records of the journal."""
SUPERVISOR = VersionRange(1, 1)
"""Requests of the front to the supervisor, and the files of the run folder."""
PROTOCOLS: Mapping[str, VersionRange] = {
    "link": LINK,
    "host": HOST,
    "edge": EDGE,
    "journal": JOURNAL,
    "supervisor": SUPERVISOR,
}
"""All of them, by name."""


def check_common(protocol: str, ours: VersionRange, theirs: VersionRange, *, who: str, way_out: str) -> int:
    """The version of a protocol to use with another process, `who`. Raises StartError with both numbers, and with
    `way_out`, when there is none."""
    common = ours.common_with(theirs)
    if common is None:
        raise StartError(
            f"{who} speaks version {theirs} of the {protocol} protocol, and this process version {ours}. {way_out}"
        )
    return common
