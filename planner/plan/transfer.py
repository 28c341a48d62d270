"""The transfer from one plan to another: bytes on each kind of link, in rounds, compared with a fresh placement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.inputs.cluster import Hardware
from planner.plan.moves import Move, moves
from planner.plan.plan import Plan

LINKS = ("local", "host", "network", "store")


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """The moves between two plans, in rounds in which a rank sends and receives at most one expert; bytes by link.

    `naive_moves` is the number of moves to a fresh placement instead.
    """

    moves: tuple[Move, ...]
    rounds: tuple[tuple[Move, ...], ...]
    bytes_by_link: dict[str, int]
    seconds: float
    naive_moves: int

    def to_dict(self) -> dict:
        """The transfer for JSON, moves as [layer, expert, rank, slot, source, peer]."""
        rows = [[m.layer, m.expert, m.rank, m.slot, m.source, m.peer] for m in self.moves]
        return {
            "moves": len(self.moves),
            "naive_moves": self.naive_moves,
            "rounds": len(self.rounds),
            "bytes_by_link": self.bytes_by_link,
            "seconds": self.seconds,
            "list": rows,
        }


def transfer(old: Plan, new: Plan, *, expert_bytes: int, hardware: Hardware, naive: Plan) -> Transfer:
    """The transfer from `old` to `new`; `naive` is the plan of a fresh placement on the same ranks."""
    made = moves(old, new)
    hosts = {r.id: r.host for r in (*old.ranks, *new.ranks)}
    kinds = [link_of(m, hosts) for m in made]
    scheduled = rounds(made)
    rate = {
        "local": hardware.memory_bandwidth,
        "host": hardware.link_bandwidth,
        "network": hardware.network_bandwidth,
        "store": hardware.host_to_device_bandwidth,
    }
    seconds = sum(max(expert_bytes / rate[link_of(m, hosts)] for m in group) for group in scheduled)
    return Transfer(
        moves=made,
        rounds=scheduled,
        bytes_by_link={link: kinds.count(link) * expert_bytes for link in LINKS},
        seconds=seconds,
        naive_moves=len(moves(old, naive)),
    )


def link_of(move: Move, hosts: dict[int, str]) -> str:
    """The slowest link of a move: local, host (same host), network or store."""
    if move.peer is None:
        return move.source
    return "host" if hosts[move.peer] == hosts[move.rank] else "network"


def rounds(made: Sequence[Move]) -> tuple[tuple[Move, ...], ...]:
    """Moves in rounds: in one round a rank receives at most one expert and sends at most one."""
    groups: list[list[Move]] = []
    receivers: list[set[int]] = []
    senders: list[set[int | None]] = []
    for m in made:
        free = (
            i for i in range(len(groups)) if m.rank not in receivers[i] and (m.peer is None or m.peer not in senders[i])
        )
        at = next(free, len(groups))
        if at == len(groups):
            groups.append([])
            receivers.append(set())
            senders.append(set())
        groups[at].append(m)
        receivers[at].add(m.rank)
        senders[at].add(m.peer)
    return tuple(tuple(g) for g in groups)
