"""Tokens to the ranks that hold their experts, and the answers back.

Each token goes at most once to each rank, with the slots it wants there; each chosen expert's answer comes
back by itself, so that the source can sum them in router order wherever the experts sit. Buffers are padded to
the worst case: no token is ever dropped. (`ragged_all_to_all` does not exist on XLA:CPU.)

Between processes of one machine the parts go through memory they share (`moejax.shared`), else by XLA's collective.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int, Shaped

from moejax import kernels
from moejax.axes import RANKS, Numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """Sizes of one exchange: n ranks, S slots on each, X experts per token. `shared`: all ranks are processes of this
    machine that have mapped the same memory."""

    ranks: int
    slots: int
    experts_per_token: int
    shared: bool = False

    @property
    def answers(self) -> int:
        """A, the most answers a token can get from one rank."""
        return min(self.slots, self.experts_per_token)

    def outbox_bytes(self, rows: int, width: int) -> int:
        """The most a rank sends at once in a step of `rows [T]` of `width [D]`."""
        return 4 * self.ranks * max(1, rows * max(width + self.answers, width * self.answers))


def all_to_all(parts_n: Shaped[Numbers, "n ..."], exchange: Exchange) -> Shaped[Numbers, "n ..."]:
    """Part i to rank i; part i of the result came from rank i."""
    return kernels.exchange(parts_n) if exchange.shared else lax.all_to_all(parts_n, RANKS, 0, 0, tiled=True)


def place(slot_TX: Int[Numbers, "T X"], exchange: Exchange) -> tuple[Int[Numbers, "T X"], Int[Numbers, "T X"]]:
    """The rank `[T, X]` (-1 for none) of each chosen physical slot (-1 for none), and which of the token's
    answers from that rank it is `[T, X]`."""
    rank_TX = jnp.where(slot_TX >= 0, slot_TX // exchange.slots, -1)
    same_TXX = rank_TX[:, :, None] == rank_TX[:, None, :]
    earlier = jnp.tril(jnp.ones(same_TXX.shape[1:], bool), -1)
    return rank_TX, (same_TXX & earlier).sum(-1)


def dispatch(
    x_TD: Float[Numbers, "T D"],
    slot_TX: Int[Numbers, "T X"],
    rank_TX: Int[Numbers, "T X"],
    nth_TX: Int[Numbers, "T X"],
    exchange: Exchange,
) -> tuple[Float[Numbers, "nT D"], Int[Numbers, "nT A"]]:
    """What this rank has to answer: rows `[n*T, D]` and the local slots each row wants `[n*T, A]`, -1 for none. A rank
    by itself answers `[T, X]`, in router order."""
    if exchange.ranks == 1:
        return x_TD, slot_TX
    sent = outgoing(x_TD, slot_TX, rank_TX, nth_TX, exchange)
    return incoming(all_to_all(sent, exchange), exchange)


def outgoing(
    x_TD: Float[Numbers, "T D"],
    slot_TX: Int[Numbers, "T X"],
    rank_TX: Int[Numbers, "T X"],
    nth_TX: Int[Numbers, "T X"],
    exchange: Exchange,
) -> Float[Numbers, "n T DA"]:
    """What goes to each of the ranks that hold experts: every row, then the local slots it wants there."""
    wanted_nTA = _wanted(slot_TX, rank_TX, nth_TX, exchange)
    rows_nTD = jnp.broadcast_to(x_TD, (exchange.ranks, *x_TD.shape))
    return jnp.concatenate([rows_nTD, wanted_nTA.astype(x_TD.dtype)], axis=-1)


def incoming(
    got_mTF: Float[Numbers, "m T DA"], exchange: Exchange
) -> tuple[Float[Numbers, "mT D"], Int[Numbers, "mT A"]]:
    """`outgoing` of m ranks, as it arrived: the rows, and the local slots each wants."""
    D = got_mTF.shape[-1] - exchange.answers
    rows_rF = got_mTF.reshape(-1, got_mTF.shape[-1])
    return rows_rF[:, :D], rows_rF[:, D:].astype(jnp.int32)


def _wanted(
    slot_TX: Int[Numbers, "T X"], rank_TX: Int[Numbers, "T X"], nth_TX: Int[Numbers, "T X"], exchange: Exchange
) -> Int[Numbers, "n T A"]:
    to_n = jnp.arange(exchange.ranks)[:, None, None, None]
    nth_A = jnp.arange(exchange.answers)[:, None]
    here_nTAX = (rank_TX[:, None, :] == to_n) & (nth_TX[:, None, :] == nth_A)
    return jnp.where(here_nTAX, slot_TX[:, None, :] % exchange.slots + 1, 0).sum(-1) - 1


def combine(
    answers_rAD: Float[Numbers, "nT A D"],
    rank_TX: Int[Numbers, "T X"],
    nth_TX: Int[Numbers, "T X"],
    gates_TX: Float[Numbers, "T X"],
    exchange: Exchange,
) -> Float[Numbers, "T D"]:
    """The gated sum `[T, D]` of the answers `[n*T, A, D]` to what `dispatch` gave, each token's in router order."""
    if exchange.ranks == 1:
        return _weighed(answers_rAD, rank_TX, gates_TX)
    back_nTAD = all_to_all(answers_rAD.reshape(exchange.ranks, -1, *answers_rAD.shape[1:]), exchange)
    return gated_sum(back_nTAD, rank_TX, nth_TX, gates_TX)


def gated_sum(
    back_nTAD: Float[Numbers, "n T A D"],
    rank_TX: Int[Numbers, "T X"],
    nth_TX: Int[Numbers, "T X"],
    gates_TX: Float[Numbers, "T X"],
) -> Float[Numbers, "T D"]:
    """The sum of a token's answers, as they came back from each rank, in router order."""
    A = back_nTAD.shape[2]
    token_T1 = jnp.arange(len(rank_TX))[:, None]
    y_TXD = back_nTAD[jnp.maximum(rank_TX, 0), token_T1, jnp.minimum(nth_TX, A - 1)]
    return _weighed(y_TXD, rank_TX, gates_TX)


def _weighed(
    y_TXD: Float[Numbers, "T X D"], rank_TX: Int[Numbers, "T X"], gates_TX: Float[Numbers, "T X"]
) -> Float[Numbers, "T D"]:
    gates_TX = jnp.where(rank_TX >= 0, gates_TX, 0.0)
    total = gates_TX[:, 0, None] * y_TXD[:, 0]
    for x in range(1, gates_TX.shape[1]):
        total = total + gates_TX[:, x, None] * y_TXD[:, x]
    return total
