"""Carries out the effects of transitions of the membership: events are emitted, replicas and parity are given up."""

from collections.abc import Callable

from serving.protocol.events import EventKind, EventLog
from serving.recovery.expert_parity import ExpertParity
from serving.recovery.kv_replicas import KVReplicas
from serving.recovery.membership_events import DropParity, DropRank, Effect, Report, ReportWeights


class Effects:
    """Does at once what a change of the membership of one server asks for. `forget_process_id` is called with a rank
    whose process id in the coordination service is not used again."""

    def __init__(
        self,
        events: EventLog,
        kv_replicas: KVReplicas,
        parity: ExpertParity,
        forget_process_id: Callable[[int], None],
    ) -> None:
        self._events = events
        self._kv_replicas = kv_replicas
        self._parity = parity
        self._forget_process_id = forget_process_id

    def execute(self, effect: Effect, epoch: int) -> None:
        """Carry out an effect of a transition after which `epoch` is that of the plan adopted last."""
        if isinstance(effect, Report):
            self._events.emit(effect.kind, epoch, rank=effect.rank, cause=effect.cause)
            return
        if isinstance(effect, ReportWeights):
            text = f"version {effect.version.label}, from {effect.version.model}"
            phases = {"adopt": 1e3 * effect.seconds}
            self._events.emit(EventKind.WEIGHTS_SWITCHED, epoch, message=text, phases=phases)
            return
        if isinstance(effect, DropParity):
            self._parity.forget_all()
            return
        self._kv_replicas.retire(effect.rank)
        if isinstance(effect, DropRank):
            self._forget_process_id(effect.rank)
            self._parity.forget(effect.rank)
