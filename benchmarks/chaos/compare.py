"""Compares the text that a client received with the text of an undisturbed run. Pure."""

import dataclasses

_LONGEST = 4096
"""Characters around a break that are searched for a repeated or missing piece."""
_SAYS_SOMETHING = 8
"""Fewer characters than these fit anywhere by chance."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """The faults of a received text, in characters."""

    missing: int = 0
    doubled: int = 0
    changed: int = 0

    @property
    def none(self) -> bool:
        """True if the text is the wanted one."""
        return self == Difference()


def compare(received: str, wanted: str, *, ended: bool) -> Difference:
    """The difference between a stream's text and the wanted one.

    `ended` says that the stream claimed to be whole; the end that a broken stream lacks is `missing`. Where the texts
    part, a piece that was sent twice and a piece that was left out are recognised, each once, if all of the rest fits;
    otherwise the rest of what was received is `changed`.
    """
    same = common_prefix(received, wanted)
    rest, expected = received[same:], wanted[same:]
    if not rest:
        return Difference(missing=len(expected))
    for d in range(1, min(same, len(rest), _LONGEST) + 1):
        if rest[:d] == received[same - d : same] and fits(rest[d:], expected, ended):
            return Difference(doubled=d, missing=len(expected) - len(rest) + d)
    if any(fits(rest, expected[d:], ended) for d in range(1, min(len(expected), _LONGEST) + 1)):
        return Difference(missing=len(expected) - len(rest))
    return Difference(changed=len(rest))


def fits(rest: str, expected: str, ended: bool) -> bool:
    """True if `rest` is the expected text, or of a stream that did not end a beginning of it that says something."""
    return rest == expected if ended else len(rest) >= _SAYS_SOMETHING and expected.startswith(rest)


def common_prefix(a: str, b: str) -> int:
    """The number of characters that two texts begin with alike."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
