"""Layers whose context is a state of the request, instead of keys and values of positions: the numbers that planner and
server share."""

from __future__ import annotations

from dataclasses import dataclass

STATE_COPIES = 3
"""States of a request on its rank. A step reads one and its commit writes the next, so that the one it read is there
until two more steps were committed; two steps may be in flight (docs/decisions/0021)."""
SNAPSHOTS_PER_REQUEST = 1
"""Snapshots of states that a rank keeps for prefix caching, for each request that it can run, unless `moejax serve` is
given another number (docs/decisions/0031)."""
STATES_PER_REQUEST = STATE_COPIES + SNAPSHOTS_PER_REQUEST
"""States for which a rank has memory, for each request that it can run."""


@dataclass(frozen=True, kw_only=True)
class ShortConvolution:
    """A gated short convolution (LFM2 technical report, arXiv 2511.23404): in place of keys and values of all positions
    a request has the last `kernel - 1` inputs of a convolution over time, which is as wide as the model. With `biased`
    the convolution and both projections have biases."""

    kernel: int
    biased: bool = False

    @property
    def matrix(self) -> None:
        """There is no state besides the last inputs."""

    def inputs(self, hidden: int) -> int:
        """Channels of the convolution."""
        return hidden

    def state_elements(self, hidden: int) -> int:
        """Numbers of a request's state in one layer."""
        return (self.kernel - 1) * hidden

    def parameters(self, hidden: int) -> int:
        """Parameters of one layer's convolution: projections in and out, and the convolution."""
        return hidden * (4 * hidden + self.kernel) + (5 * hidden if self.biased else 0)


@dataclass(frozen=True, kw_only=True)
class DeltaNet:
    """A gated delta net (arXiv 2412.06464) as Qwen3-Next has it: in place of keys and values of all positions a request
    has one matrix `[d_key, d_value]` for each of `value_heads`, and the last `kernel - 1` inputs of a short convolution
    over time. `key_heads` heads of queries and keys serve as many value heads each."""

    key_heads: int
    value_heads: int
    d_key: int
    d_value: int
    kernel: int = 4

    @property
    def keys(self) -> int:
        """Numbers of a row's keys, and of its queries."""
        return self.key_heads * self.d_key

    @property
    def values(self) -> int:
        """Numbers of a row's values."""
        return self.value_heads * self.d_value

    @property
    def channels(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.keys + self.values

    @property
    def matrix(self) -> tuple[int, int, int]:
        """Heads, keys and values of the state."""
        return self.value_heads, self.d_key, self.d_value

    def inputs(self, hidden: int) -> int:
        """Channels of the convolution, whatever the hidden size of the model."""
        return self.channels

    def state_elements(self, hidden: int) -> int:
        """Numbers of a request's state in one layer, whatever the hidden size of the model."""
        return self.values * self.d_key + (self.kernel - 1) * self.channels

    def parameters(self, hidden: int) -> int:
        """Parameters of one layer's delta net: projections in and out, convolution, rates of decay, norm."""
        projections = hidden * (self.channels + 2 * self.values + 2 * self.value_heads)
        return projections + self.channels * self.kernel + 2 * self.value_heads + self.d_value


@dataclass(frozen=True, kw_only=True)
class Mamba2:
    """A Mamba-2 layer (arXiv 2405.21060): a request has one matrix `[d_state, d_head]` for each of `heads`, and the
    last `kernel - 1` inputs of a convolution over time, which has a bias if `biased`. Each of `groups` serves as many
    heads with what they write to the state and read from it (B and C in the paper)."""

    heads: int
    d_head: int
    groups: int
    d_state: int
    kernel: int = 4
    biased: bool = True

    @property
    def keys(self) -> int:
        """Numbers that all groups write with, and as many that they read with."""
        return self.groups * self.d_state

    @property
    def values(self) -> int:
        """Numbers of a row's values, and of its gate."""
        return self.heads * self.d_head

    @property
    def channels(self) -> int:
        """Channels of the convolution: values, and what groups write and read with."""
        return self.values + 2 * self.keys

    @property
    def matrix(self) -> tuple[int, int, int]:
        """Heads, keys and values of the state."""
        return self.heads, self.d_state, self.d_head

    def inputs(self, hidden: int) -> int:
        """Channels of the convolution, whatever the hidden size of the model."""
        return self.channels

    def state_elements(self, hidden: int) -> int:
        """Numbers of a request's state in one layer, whatever the hidden size of the model."""
        return self.values * self.d_state + (self.kernel - 1) * self.channels

    def parameters(self, hidden: int) -> int:
        """Parameters of one layer: projections in and out, convolution, step sizes, decay, skips, norm."""
        projections = hidden * (2 * self.values + self.channels + self.heads)
        return projections + self.channels * (self.kernel + self.biased) + 3 * self.heads + self.values


@dataclass(frozen=True, kw_only=True)
class KimiDelta:
    """Kimi delta attention (arXiv 2510.26692): a gated delta net of `heads` whose state decays by key, not by head. The
    projections of decay and output gate go through `d_low` numbers, or are whole (0). `least_log` bounds the logarithm
    of a decay from below (Ling 3), or is None."""

    heads: int
    d_head: int
    kernel: int = 4
    d_low: int = 0
    least_log: float | None = None

    @property
    def keys(self) -> int:
        """Numbers of a row's queries, of its keys, of its values, of its decays, and of its gate."""
        return self.heads * self.d_head

    @property
    def channels(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 3 * self.keys

    @property
    def matrix(self) -> tuple[int, int, int]:
        """Heads, keys and values of the state."""
        return self.heads, self.d_head, self.d_head

    def inputs(self, hidden: int) -> int:
        """Channels of the convolution, whatever the hidden size of the model."""
        return self.channels

    def state_elements(self, hidden: int) -> int:
        """Numbers of a request's state in one layer, whatever the hidden size of the model."""
        return self.keys * self.d_head + (self.kernel - 1) * self.channels

    def parameters(self, hidden: int) -> int:
        """Parameters of one layer: projections, convolution, decays, norm."""
        gate = self.d_low * (hidden + self.keys) if self.d_low else hidden * self.keys
        projections = 2 * gate + hidden * (self.channels + self.heads + self.keys)
        return projections + self.channels * self.kernel + self.keys + self.heads + self.d_head


StateMixer = ShortConvolution | DeltaNet | Mamba2 | KimiDelta
"""The part of a layer in place of attention whose context is a state."""
