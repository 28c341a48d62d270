"""The order of what is due between two steps; docs/membership.md is computed from it."""

import dataclasses
import enum
from collections.abc import Callable, Collection, Iterator

from serving.recovery.membership import Membership

GATHER_S = 2.0
"""How long a READY rank waits for others that are STARTING, before a new generation is formed."""


class DueWork(enum.Enum):
    """Work that must run while no step is in flight."""

    RECOVER = "ranks of the plan were lost, an exchange failed, or the communicators cannot be used any more"
    RESTORE_KV = "requests wait for KV entries from replicas"
    MAINTAIN = "ranks are leaving, weights are damaged, or requests must be computed again"
    SWITCH_WEIGHTS = "other weights are loaded on all ranks, and the plan in force does not have them"
    ADMIT = "ready ranks can enter the running generation"
    REJOIN = "ready ranks need a new generation"
    EXPAND = "the plan can take in the ranks that joined"
    RECONCILE = "the plan in force lacks experts of the desired plan"
    PREPARE_AHEAD = "a mesh that joined ranks wait for could not be prepared"
    CONNECT = "a mesh is loaded and not connected"


BESIDE_A_STEP = frozenset({DueWork.PREPARE_AHEAD})
"""Work that can wait for the next pause between steps: it does not stop a step from being sent ahead."""
URGENT = frozenset(
    {
        DueWork.RECOVER,
        DueWork.SWITCH_WEIGHTS,
        DueWork.ADMIT,
        DueWork.REJOIN,
        DueWork.EXPAND,
        DueWork.CONNECT,
    }
)
"""Work that a loop without a step to send does not sleep over."""
ONE_AT_A_TIME = (
    DueWork.SWITCH_WEIGHTS,
    DueWork.ADMIT,
    DueWork.REJOIN,
    DueWork.EXPAND,
    DueWork.RECONCILE,
    DueWork.PREPARE_AHEAD,
    DueWork.CONNECT,
)
"""Work of which one piece is done between two steps, the first that is due."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pending:
    """The inputs of the order beside the membership. `feasible` is true for ranks that can serve without others,
    `prepared` for the ranks of a larger plan if its mesh, and that of every single loss of it, is connected. Both are
    functions of the plans alone, and are called only where it matters."""

    restoring: bool
    """KV entries of requests are to be restored from replicas."""
    maintaining: bool
    """Weights are to be reloaded, or requests to be computed again."""
    spare_ids: int
    """Replacements that the running generation has process ids for."""
    loading: bool
    """Executables are being loaded beside the steps."""
    retry_preparation: bool
    """The last attempt to prepare a stalled mesh is long enough ago."""
    feasible: Callable[[Collection[int]], bool]
    prepared: Callable[[Collection[int]], bool]


def due_work(m: Membership, pending: Pending, now: float) -> Iterator[DueWork]:
    """The work that is due now, in the order in which it is done. `now` is in seconds of the front's clock."""
    if must_recover(m):
        yield DueWork.RECOVER
    if pending.restoring:
        yield DueWork.RESTORE_KV
    if m.leaving or pending.maintaining:
        yield DueWork.MAINTAIN
    if m.plan is not None and m.next_weights != m.weights:
        yield DueWork.SWITCH_WEIGHTS
    if can_admit(m, pending.spare_ids):
        yield DueWork.ADMIT
    if can_rejoin(m, now) and pending.feasible({*m.members, *m.ready}):
        yield DueWork.REJOIN
    if m.plan is None:
        return
    expanding = bool(m.joined) and not m.comm_broken and pending.prepared(m.members)
    if expanding:
        yield DueWork.EXPAND
    if m.next_part is not None:
        yield DueWork.RECONCILE
    stalled = m.joined and not (expanding or m.loaded or pending.loading or m.service_lost)
    if stalled and pending.retry_preparation:
        yield DueWork.PREPARE_AHEAD
    if m.loaded:
        yield DueWork.CONNECT


def must_recover(m: Membership) -> bool:
    """Whether no step can run before a recovery."""
    return bool(m.losses) or (m.plan is not None and (m.comm_broken or m.exchange_failed))


def can_admit(m: Membership, spare_ids: int) -> bool:
    """Whether the READY ranks can enter the running generation, which has `spare_ids` process ids left."""
    if m.plan is None or m.comm_broken or m.service_lost or m.joining:
        return False
    return 0 < len(m.ready) <= spare_ids


def can_rejoin(m: Membership, now: float) -> bool:
    """Whether ranks wait for a new generation, and no other rank is about to be READY."""
    if not m.ready and not (m.service_lost and m.joined):
        return False
    return not (m.starting and (m.ready_since is None or now - m.ready_since <= GATHER_S))
