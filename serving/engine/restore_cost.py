"""Predicts whether restoring the KV of a lost request is faster than computing it again.

Both times are linear in tokens; the lines are fitted to this server's own measurements, which decay. By the first
guesses a prefill costs more than a copy.
"""

import dataclasses

_MEMORY = 0.98
"""Weight that a measurement keeps after each later one."""


@dataclasses.dataclass(frozen=True)
class LinearFit:
    """Seconds as a line over tokens, `fixed + slope * tokens`, by least squares over weighted sums of measurements."""

    weight: float
    x: float
    xx: float
    y: float
    xy: float

    @classmethod
    def guess(cls, fixed: float, slope: float, tokens: int) -> "LinearFit":
        """A line before anything is measured, from two points: 0 tokens and `tokens`."""
        end = fixed + slope * tokens
        return cls(2.0, tokens, float(tokens) ** 2, fixed + end, tokens * end)

    def observed(self, tokens: int, seconds: float) -> "LinearFit":
        """The fit after one more measurement."""
        kept = [value * _MEMORY for value in (self.weight, self.x, self.xx, self.y, self.xy)]
        more = (1.0, tokens, tokens * tokens, seconds, tokens * seconds)
        return LinearFit(*(old + new for old, new in zip(kept, more, strict=True)))

    @property
    def slope(self) -> float:
        """Seconds per token."""
        spread = self.weight * self.xx - self.x * self.x
        return max(0.0, (self.weight * self.xy - self.x * self.y) / spread) if spread > 0 else 0.0

    @property
    def fixed(self) -> float:
        """Seconds independent of the tokens."""
        return max(0.0, (self.y - self.slope * self.x) / self.weight)

    def at(self, tokens: int) -> float:
        """Predicted seconds for this many tokens."""
        return self.fixed + self.slope * tokens


@dataclasses.dataclass(frozen=True)
class RestoreCosts:
    """Measured costs: `step` over the prefill tokens of its busiest rank, `piece` over the KV entries restored in one
    message."""

    step: LinearFit
    piece: LinearFit

    @classmethod
    def guess(cls, token_bytes: int) -> "RestoreCosts":
        """First guesses: 20 ms a step and 1 ms per prefill token; 3 ms a message and copies at 1 GB/s."""
        return cls(LinearFit.guess(0.020, 1e-3, 64), LinearFit.guess(0.003, token_bytes / 1e9, 256))

    def with_step(self, tokens: int, seconds: float) -> "RestoreCosts":
        """The costs after a step with this many prefill tokens on its busiest rank."""
        return dataclasses.replace(self, step=self.step.observed(tokens, seconds))

    def with_copy(self, entries: int, seconds: float) -> "RestoreCosts":
        """The costs after one message that restored this many entries."""
        return dataclasses.replace(self, piece=self.piece.observed(entries, seconds))

    def serial_prefill(self, tokens: int) -> bool:
        """Whether prompts of this length get their first token sooner, on average, one after the other than together:
        one more step costs less than a prompt."""
        return self.step.fixed < self.step.slope * tokens

    def recompute_s(self, tokens: int, chunk: int) -> float:
        """Seconds until the next token of a request with this many tokens to compute, `chunk` of them in a step."""
        return -(-tokens // chunk) * self.step.fixed + tokens * self.step.slope

    def restore_s(self, entries: int, piece: int, budget_s: float) -> float:
        """Seconds until this many entries are restored, `piece` in a message, with a step after every `budget_s` of
        copying."""
        whole, rest = divmod(entries, piece)
        copying = whole * self.piece.at(piece) + (self.piece.at(rest) if rest else 0.0)
        return copying + int(copying / budget_s) * self.step.fixed


def should_restore(
    costs: RestoreCosts, length: int, entries: int, *, found: int, chunk: int, piece: int, budget_s: float
) -> bool:
    """Whether to restore a request of `length` tokens from the `entries` in a replica. `found` of them are in the
    prefix cache of another rank in any case."""
    if entries <= found:
        return False
    left = costs.restore_s(entries - found, piece, budget_s) + costs.recompute_s(length - entries, chunk)
    return left < costs.recompute_s(length - found, chunk)
