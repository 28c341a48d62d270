"""The result of a run as a value; its JSON schema is `python -m benchmarks.chaos --schema`."""

import itertools
from collections.abc import Mapping, Sequence

import msgspec

from benchmarks.chaos.compare import Difference, compare
from benchmarks.chaos.streams import Stream
from benchmarks.stalls import goodput_loss

VERSION = 1
"""Of the result. Raised when a field changes its meaning."""


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One fault and what the clients saw of it, until the next one."""

    selector: str
    """The process that it hit, as the target names it."""
    signal: str
    """SIGKILL or SIGSTOP."""
    at_s: float
    """Seconds since the load began."""
    open_streams: int
    """Streams that were open at that moment."""
    streams_lost: int
    """Of these, streams that ended in an error, or without an end."""
    longest_wait_s: float | None
    """The longest time that a client had no new text, over the fault; None if no text came again."""
    back_s: float | None
    """Seconds until text arrives at 95 % of its usual rate for two seconds; None if it did not."""
    tokens_not_sent: float | None
    """Tokens that would have been sent until then at the usual rate, and were not."""
    restarts: int
    """Restarts of the whole server that it caused."""


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """All streams of a run under faults, compared with the same requests undisturbed."""

    streams: int
    streams_lost: int
    """Streams that ended in an error, or without an end."""
    requests_refused: int
    """Requests that failed before any text, which the client's own retries did not mend."""
    streams_changed: int
    """Streams with a difference other than a missing end."""
    tokens_lost: float
    """Tokens of lost streams that their clients never received, and tokens left out in the middle of others."""
    tokens_doubled: float
    tokens_changed: float
    streams_changed_undisturbed: int
    """Streams that differed between two undisturbed runs of the same requests: what the server changes by itself."""
    restarts: int


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One run of `python -m benchmarks.chaos`."""

    version: int
    target: str
    """The server's name and version."""
    model: str
    setup: str
    """How the server was started, in words."""
    machine: dict[str, str | int | float]
    clients: int
    answer_tokens: float
    """Tokens of an answer, the mean of the undisturbed run."""
    usual_rate: float
    """Tokens a second, all clients together, undisturbed."""
    faults: list[Fault]
    totals: Totals


def tokens_a_character(streams: Sequence[Stream]) -> float:
    """Tokens for a character of text, from streams that ended: texts are compared, and tokens are reported."""
    counted = [stream for stream in streams if stream.tokens is not None and stream.text]
    characters = sum(len(stream.text) for stream in counted)
    if not characters:
        raise ValueError(f"none of {len(streams)} undisturbed streams had text and usage.completion_tokens")
    return sum(stream.tokens or 0 for stream in counted) / characters


def differences(streams: Sequence[Stream], wanted: Mapping[str, str]) -> list[Difference]:
    """The difference between each stream and its undisturbed answer."""
    return [compare(stream.text, wanted[stream.prompt], ended=stream.error is None) for stream in streams]


def totals(
    streams: Sequence[Stream], wanted: Mapping[str, str], rate: float, *, by_itself: int, restarts: int
) -> Totals:
    """The sums over all streams. `rate` is in tokens a character."""
    compared = differences(streams, wanted)
    begun = [bool(stream.text) for stream in streams]
    lost = [stream.error is not None for stream in streams]
    return Totals(
        streams=len(streams),
        streams_lost=sum(a and b for a, b in zip(begun, lost, strict=True)),
        requests_refused=sum(b and not a for a, b in zip(begun, lost, strict=True)),
        streams_changed=sum(
            bool(d.doubled or d.changed or (d.missing and not broken)) for d, broken in zip(compared, lost, strict=True)
        ),
        tokens_lost=round(rate * sum(d.missing for d, a in zip(compared, begun, strict=True) if a), 1),
        tokens_doubled=round(rate * sum(d.doubled for d in compared), 1),
        tokens_changed=round(rate * sum(d.changed for d in compared), 1),
        streams_changed_undisturbed=by_itself,
        restarts=restarts,
    )


def longest_wait(streams: Sequence[Stream], begin: float, end: float) -> float | None:
    """The longest time without text for a client, over the waits that overlap with [begin, end]: from its last
    text to its next, in the same stream or in a later one. None if a client received nothing more."""
    waits = []
    for client in {stream.client for stream in streams}:
        times = sorted(t for stream in streams if stream.client == client for t in stream.times)
        before = [t for t in times if t <= begin]
        after = [t for t in times if t > begin]
        if not after:
            return None
        path = [
            before[-1] if before else begin,
            *(t for t in after if t <= end),
            next((t for t in after if t > end), end),
        ]
        waits += [b - a for a, b in itertools.pairwise(path)]
    return max(waits, default=None)


def fault(
    streams: Sequence[Stream],
    *,
    selector: str,
    signal: str,
    moment: float,
    began: float,
    usual_since: float,
    end: float,
    restarts: int,
    tokens_a_piece: float,
) -> Fault:
    """The effect on clients of a fault at `moment`, until `end`; the usual rate is that since `usual_since`."""
    running = [s for s in streams if s.times and s.times[0] <= moment and (s.ended is None or s.ended > moment)]
    pieces = [t for s in streams for t in s.times if t <= end]
    loss = goodput_loss(pieces, moment, since=usual_since)
    wait = longest_wait([s for s in streams if s.sent <= end], moment, end)
    return Fault(
        selector=selector,
        signal=signal,
        at_s=round(moment - began, 2),
        open_streams=len(running),
        streams_lost=sum(s.error is not None for s in running),
        longest_wait_s=None if wait is None else round(wait, 3),
        back_s=None if loss is None else round(loss[0], 2),
        tokens_not_sent=None if loss is None else round(loss[1] * tokens_a_piece, 1),
        restarts=restarts,
    )
