"""Moves requests between the pool that computes prompts and the pool that decodes (docs/decisions/0025).

A prompt is computed in the prefill pool, where its request stops once a single token is left to compute. As soon as the
replica of its rank's KV cache has all of its entries, the request goes to the queue of the decode pool, which restores
them from that replica, as it does for a lost rank. The prefill pool holds the pages until the decode pool has sent a
token. A request that the decode pool has to compute again goes back. While one pool cannot serve, the other one does
all of the work.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

from serving.engine import hand_over
from serving.engine.sequence import RecoverableKV, Sequence
from serving.engine.state import EngineState
from serving.executor.executor import RankExecutor
from serving.executor.failure_detector import Cause
from serving.protocol import clock
from serving.recovery.failover import Failover

REPLICATION_POLL_S = 0.002
"""Seconds between two looks whether a replica has the entries of a request that waits to be sent."""
NOT_REPLICATED_S = 10.0
"""Seconds after which a rank whose replica still lacks them is lost: it makes none any more."""


class PooledEngine(Protocol):
    """The parts of the engine of a pool that a hand-over uses."""

    state: EngineState
    failover: Failover
    executor: RankExecutor

    def wake(self) -> None:
        """Make the loop check what is due."""
        ...

    def call_later(self, delay_s: float, act: Callable[[], None]) -> object:
        """Call a function after so many seconds."""
        ...


class HandOver:
    """The requests of two pools, which share readers, request log and KV replicas."""

    def __init__(self, prefill: PooledEngine, decode: PooledEngine) -> None:
        self._prefill = prefill
        self._decode = decode
        self._waits_since: dict[str, float] = {}
        """When requests were seen first whose entries are not in the replica of their rank yet."""
        self._polls = False
        self._charged = decode.state.counters
        self.sent = 0
        self.returned = 0
        """Requests that went to the decode pool, and back."""

    def run(self) -> None:
        """Move every request that is in the wrong pool, and release what need not be held any more. Called before each
        step of either pool."""
        prefill, decode = self._prefill, self._decode
        both = prefill.failover.plan is not None and decode.failover.plan is not None
        prefill.state = hand_over.decoding_here(prefill.state, not both)
        if both:
            self._send_prompts()
            self._move_waiting(prefill, decode, lambda each: bool(each.generated) and self._fits(each))
            self._move_waiting(decode, prefill, lambda each: hand_over.is_prompt(decode.state, each))
        elif prefill.failover.plan is not None:
            self._move_waiting(decode, prefill, lambda _: True)
        elif decode.failover.plan is not None:
            self._move_waiting(prefill, decode, lambda _: True)
        self._release()
        self._share_counters()

    def count_arrivals(self) -> None:
        """Give both pools the same count of arrivals, the higher one, so that the next request of either pool comes
        after all requests of both."""
        arrivals = max(each.state.arrivals for each in (self._prefill, self._decode))
        for each in (self._prefill, self._decode):
            each.state = dataclasses.replace(each.state, arrivals=arrivals)

    def _send_prompts(self) -> None:
        """Send requests that wait for their next decode row, as far as the decode pool has room for them."""
        prefill, decode = self._prefill, self._decode
        waits: dict[str, float] = {}
        for sequence in hand_over.sequences_to_send(prefill.state):
            if not hand_over.has_room(decode.state, sequence):
                break
            entries = None
            if sequence.computed:
                entries = prefill.failover.kv_replicas.to_send(sequence, prefill.state.limits.page_size)
                if entries is None:
                    waits[sequence.id] = self._waits_since.get(sequence.id, clock.now())
                    self._check_replication(sequence, waits[sequence.id])
                    continue
                if prefill.state.root_key != decode.state.root_key:
                    entries = dataclasses.replace(entries, page_keys=None)
            prefill.state = hand_over.send(prefill.state, sequence.id)
            self._receive(prefill, decode, sequence, entries)
            self.sent += 1
        self._waits_since = waits
        if waits and not self._polls:
            self._polls = True
            self._prefill.call_later(REPLICATION_POLL_S, self._poll)

    def _poll(self) -> None:
        """Look again whether replicas have the entries of requests that wait to be sent."""
        self._polls = False
        self.run()

    def _check_replication(self, sequence: Sequence, since: float) -> None:
        """A rank that has stopped to make a replica would keep its requests for ever: it is replaced."""
        prefill, rank = self._prefill, sequence.rank
        if rank is None or rank in prefill.failover.membership.losses:
            return
        if clock.now() - since > NOT_REPLICATED_S:
            cause = Cause("error", f"its cache entries were not in their replica within {NOT_REPLICATED_S:g} s")
            prefill.executor.declare(rank, cause, clock.now())

    def _move_waiting(self, source: PooledEngine, target: PooledEngine, wanted: Callable[[Sequence], bool]) -> None:
        """Move the waiting requests that are `wanted` elsewhere."""
        ids = [key for key, sequence in source.state.waiting.items() if wanted(sequence)]
        target.state = hand_over.release(target.state, ids)
        source.state, taken = hand_over.take_out(source.state, ids)
        for sequence in taken:
            self._receive(source, target, sequence, sequence.recoverable)
        self.returned += len(taken) if target is self._prefill else 0

    def _fits(self, sequence: Sequence) -> bool:
        """Whether the decode pool can go on with a request at once, with what it or a replica has of it."""
        state = self._decode.state
        return hand_over.has_room(state, sequence) and not hand_over.is_prompt(state, sequence)

    def _receive(
        self, source: PooledEngine, target: PooledEngine, sequence: Sequence, entries: RecoverableKV | None
    ) -> None:
        """Put a request into the queue of the other pool, with what it is suspected of."""
        target.state = hand_over.receive(target.state, sequence, entries)
        left, incidents = source.state.suspicion.without(sequence.id)
        if incidents:
            source.state = source.state.with_suspicion(left)
            target.state = target.state.with_suspicion(target.state.suspicion.with_incidents(incidents))
        target.wake()

    def _release(self) -> None:
        """Give up the pages of requests that have got a token from the decode pool, or have ended there."""
        prefill, decode = self._prefill, self._decode
        done = []
        for request_id, before in prefill.state.sent.items():
            now = decode.state.find(request_id)
            if now is None or now.known_tokens > before.known_tokens:
                done.append(request_id)
        prefill.state = hand_over.release(prefill.state, done)

    def _share_counters(self) -> None:
        """Charge what owners were served by the decode pool in the prefill pool, which decides whose turn it is."""
        served = self._decode.state.counters
        if served is self._charged:
            return
        costs = {owner: used - self._charged.of(owner) for owner, used in served.used.items()}
        costs = {owner: cost for owner, cost in costs.items() if cost > 0}
        self._charged = served
        state = self._prefill.state
        self._prefill.state = dataclasses.replace(state, counters=state.counters.charge(costs))
