"""Layers whose context is a state of the request, instead of keys and values of positions: the numbers that planner and
server share."""

from __future__ import annotations

from dataclasses import dataclass

STATE_COPIES = 3
"""States of a request on its rank. A step reads one and its commit writes the next, so that the one it read is there
until two more steps were committed; two steps may be in flight (docs/decisions/0021)."""


@dataclass(frozen=True, kw_only=True)
class ShortConvolution:
    """A gated short convolution (LFM2 technical report, arXiv 2511.23404): in place of keys and values of all positions
    a request has the last `kernel - 1` inputs of a convolution over time, which is as wide as the model. With `biased`
    the convolution and both projections have biases."""

    kernel: int
    biased: bool = False

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

    def state_elements(self, hidden: int) -> int:
        """Numbers of a request's state in one layer, whatever the hidden size of the model."""
        return self.values * self.d_key + (self.kernel - 1) * self.channels

    def parameters(self, hidden: int) -> int:
        """Parameters of one layer's delta net: projections in and out, convolution, rates of decay, norm."""
        projections = hidden * (self.channels + 2 * self.values + 2 * self.value_heads)
        return projections + self.channels * self.kernel + 2 * self.value_heads + self.d_value
