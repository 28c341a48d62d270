"""Tokens to the ranks that hold their experts, and the experts' answers back.

Each token goes at most once to each rank, with the slots that it wants there. Each chosen expert's answer comes back
separately, so that the source sums them in router order wherever the experts sit. Buffers are padded to the worst case:
no token is ever dropped. (`ragged_all_to_all` does not exist on XLA:CPU.)

Between processes of one machine the parts go through memory that they share (`moejax.model.shared_memory`), otherwise
through XLA's collective.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int, Shaped

from moejax.config.axes import RANKS, ArrayLike
from moejax.ops import cpu


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """Sizes of one exchange: n ranks, P slots on each, X experts per token."""

    ranks: int
    slots: int
    experts_per_token: int
    shared_memory: bool = False
    """All ranks are processes of this machine that have mapped the same memory."""

    @property
    def answers(self) -> int:
        """A, the most answers that a token can get from one rank."""
        return min(self.slots, self.experts_per_token)

    def outbox_bytes(self, rows: int, width: int) -> int:
        """The most bytes that a rank sends at once in a step of `rows [T]` of `width [D]`."""
        return 4 * self.ranks * max(1, rows * max(width + self.answers, width * self.answers))


def all_to_all(parts_n: Shaped[ArrayLike, "n ..."], exchange: Exchange) -> Shaped[ArrayLike, "n ..."]:
    """Send part i to rank i; part i of the result came from rank i."""
    return cpu.exchange(parts_n) if exchange.shared_memory else lax.all_to_all(parts_n, RANKS, 0, 0, tiled=True)


def locate(slot_TX: Int[ArrayLike, "T X"], exchange: Exchange) -> tuple[Int[ArrayLike, "T X"], Int[ArrayLike, "T X"]]:
    """The rank of each chosen physical slot (-1 for none), and which of the token's answers from that rank it is."""
    rank_TX = jnp.where(slot_TX >= 0, slot_TX // exchange.slots, -1)
    same_TXX = rank_TX[:, :, None] == rank_TX[:, None, :]
    earlier = jnp.tril(jnp.ones(same_TXX.shape[1:], bool), -1)
    return rank_TX, (same_TXX & earlier).sum(-1)


def dispatch(
    x_TD: Float[ArrayLike, "T D"],
    slot_TX: Int[ArrayLike, "T X"],
    rank_TX: Int[ArrayLike, "T X"],
    nth_TX: Int[ArrayLike, "T X"],
    exchange: Exchange,
) -> tuple[Float[ArrayLike, "nT D"], Int[ArrayLike, "nT A"]]:
    """Send rows to the ranks of their experts.

    Returns the rows that this rank must answer and the local slots that each wants (-1 for none). A rank by itself
    answers all X experts of its T rows, in router order.
    """
    if exchange.ranks == 1:
        return x_TD, slot_TX
    sent = pack_outbox(x_TD, slot_TX, rank_TX, nth_TX, exchange)
    return unpack_inbox(all_to_all(sent, exchange), exchange)


def pack_outbox(
    x_TD: Float[ArrayLike, "T D"],
    slot_TX: Int[ArrayLike, "T X"],
    rank_TX: Int[ArrayLike, "T X"],
    nth_TX: Int[ArrayLike, "T X"],
    exchange: Exchange,
) -> Float[ArrayLike, "n T DA"]:
    """The message to each rank that holds experts: every row, then the local slots that it wants there."""
    wanted_nTA = _wanted(slot_TX, rank_TX, nth_TX, exchange)
    rows_nTD = jnp.broadcast_to(x_TD, (exchange.ranks, *x_TD.shape))
    return jnp.concatenate([rows_nTD, wanted_nTA.astype(x_TD.dtype)], axis=-1)


def unpack_inbox(
    got_mTF: Float[ArrayLike, "m T DA"], exchange: Exchange
) -> tuple[Float[ArrayLike, "mT D"], Int[ArrayLike, "mT A"]]:
    """The rows of `pack_outbox` messages from m ranks, and the local slots that each row wants."""
    D = got_mTF.shape[-1] - exchange.answers
    rows_rF = got_mTF.reshape(-1, got_mTF.shape[-1])
    return rows_rF[:, :D], rows_rF[:, D:].astype(jnp.int32)


def _wanted(
    slot_TX: Int[ArrayLike, "T X"], rank_TX: Int[ArrayLike, "T X"], nth_TX: Int[ArrayLike, "T X"], exchange: Exchange
) -> Int[ArrayLike, "n T A"]:
    to_n = jnp.arange(exchange.ranks)[:, None, None, None]
    nth_A = jnp.arange(exchange.answers)[:, None]
    here_nTAX = (rank_TX[:, None, :] == to_n) & (nth_TX[:, None, :] == nth_A)
    return jnp.where(here_nTAX, slot_TX[:, None, :] % exchange.slots + 1, 0).sum(-1) - 1


def combine(
    answers_rAD: Float[ArrayLike, "nT A D"],
    rank_TX: Int[ArrayLike, "T X"],
    nth_TX: Int[ArrayLike, "T X"],
    gates_TX: Float[ArrayLike, "T X"],
    exchange: Exchange,
) -> Float[ArrayLike, "T D"]:
    """Send answers back and sum them: the gated sum of the answers to the rows of `dispatch`, in router order."""
    if exchange.ranks == 1:
        return _weighted_sum(answers_rAD, rank_TX, gates_TX)
    back_nTAD = all_to_all(answers_rAD.reshape(exchange.ranks, -1, *answers_rAD.shape[1:]), exchange)
    return gated_sum(back_nTAD, rank_TX, nth_TX, gates_TX)


def gated_sum(
    back_nTAD: Float[ArrayLike, "n T A D"],
    rank_TX: Int[ArrayLike, "T X"],
    nth_TX: Int[ArrayLike, "T X"],
    gates_TX: Float[ArrayLike, "T X"],
) -> Float[ArrayLike, "T D"]:
    """The gated sum of each token's answers as they came back from every rank, in router order."""
    A = back_nTAD.shape[2]
    token_T1 = jnp.arange(len(rank_TX))[:, None]
    y_TXD = back_nTAD[jnp.maximum(rank_TX, 0), token_T1, jnp.minimum(nth_TX, A - 1)]
    return _weighted_sum(y_TXD, rank_TX, gates_TX)


def _weighted_sum(
    y_TXD: Float[ArrayLike, "T X D"], rank_TX: Int[ArrayLike, "T X"], gates_TX: Float[ArrayLike, "T X"]
) -> Float[ArrayLike, "T D"]:
    """One addend after the other, so that the order is the router's."""
    gates_TX = jnp.where(rank_TX >= 0, gates_TX, 0.0)
    total_TD = gates_TX[:, 0, None] * y_TXD[:, 0]
    for x in range(1, gates_TX.shape[1]):
        total_TD = total_TD + gates_TX[:, x, None] * y_TXD[:, x]
    return total_TD
