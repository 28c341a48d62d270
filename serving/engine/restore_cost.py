"""Whether it is quicker to restore the cache of a lost request than to compute it again. Values and arithmetic.

Both are predicted by lines, seconds over tokens, that are fitted to what this server has measured; what is older counts
less. The first guesses are such that a prefill is expected to cost more than a copy.
"""

import dataclasses

_MEMORY = 0.98
"""What a measurement counts after the next one."""


@dataclasses.dataclass(frozen=True)
class Line:
    """Seconds that `tokens` take: `fixed + slope * tokens`, by least squares over weighted sums of measurements."""

    weight: float
    x: float
    xx: float
    y: float
    xy: float

    @classmethod
    def guess(cls, fixed: float, slope: float, tokens: int) -> "Line":
        """Before anything is measured, from two points: nothing, and so many tokens."""
        end = fixed + slope * tokens
        return cls(2.0, tokens, float(tokens) ** 2, fixed + end, tokens * end)

    def seen(self, tokens: int, seconds: float) -> "Line":
        """After one more measurement."""
        kept = [value * _MEMORY for value in (self.weight, self.x, self.xx, self.y, self.xy)]
        more = (1.0, tokens, tokens * tokens, seconds, tokens * seconds)
        return Line(*(old + new for old, new in zip(kept, more, strict=True)))

    @property
    def slope(self) -> float:
        """Seconds for one token more."""
        spread = self.weight * self.xx - self.x * self.x
        return max(0.0, (self.weight * self.xy - self.x * self.y) / spread) if spread > 0 else 0.0

    @property
    def fixed(self) -> float:
        """Seconds that do not depend on the tokens."""
        return max(0.0, (self.y - self.slope * self.x) / self.weight)

    def at(self, tokens: int) -> float:
        """Seconds for so many tokens."""
        return self.fixed + self.slope * tokens


@dataclasses.dataclass(frozen=True)
class Costs:
    """`step` over the prefill tokens of the busiest rank in it, `piece` over the entries restored in one message."""

    step: Line
    piece: Line

    @classmethod
    def guess(cls, token_bytes: int) -> "Costs":
        """A step of 20 ms and 1 ms for each token of a prefill; a message of 3 ms and copies at 1 GB/s."""
        return cls(Line.guess(0.020, 1e-3, 64), Line.guess(0.003, token_bytes / 1e9, 256))

    def stepped(self, tokens: int, seconds: float) -> "Costs":
        """A step with so many prefill tokens on its busiest rank took so long."""
        return dataclasses.replace(self, step=self.step.seen(tokens, seconds))

    def copied(self, entries: int, seconds: float) -> "Costs":
        """So many entries were restored in one message."""
        return dataclasses.replace(self, piece=self.piece.seen(entries, seconds))

    def in_turn(self, tokens: int) -> bool:
        """Whether prompts of so many tokens have their first token sooner, on the whole, one after the other than all
        together: another step costs less than a prompt."""
        return self.step.fixed < self.step.slope * tokens

    def recompute_s(self, tokens: int, chunk: int) -> float:
        """Until the next token of a request of which so many are to be computed, `chunk` of them in a step."""
        return -(-tokens // chunk) * self.step.fixed + tokens * self.step.slope

    def restore_s(self, entries: int, piece: int, budget_s: float) -> float:
        """Until so many entries are restored, `piece` in a message, with a step whenever `budget_s` are used up."""
        whole, rest = divmod(entries, piece)
        copying = whole * self.piece.at(piece) + (self.piece.at(rest) if rest else 0.0)
        return copying + int(copying / budget_s) * self.step.fixed


def is_restored(
    costs: Costs, length: int, entries: int, *, found: int, chunk: int, piece: int, budget_s: float
) -> bool:
    """Whether a request of `length` tokens, of which `entries` are in a copy, is restored from it; `found` of them are
    in the cache of another rank in any case."""
    if entries <= found:
        return False
    left = costs.restore_s(entries - found, piece, budget_s) + costs.recompute_s(length - entries, chunk)
    return left < costs.recompute_s(length - found, chunk)
