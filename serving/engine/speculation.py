"""Speculation: drafts of the next tokens of a request, and how many of them a step takes. They are found in its own
tokens, or the model's layer of multi-token prediction made them in the step before.

A draft is a guess. A step computes a row for each and samples the token that follows it, with the key of its position;
the token is kept while the draft before it is the token that was sampled there. So drafts change when a token is
computed, never which (docs/decisions/0022). Pure: no clock, and the same drafts from the same history.

How many drafts a request gets depends on how often its drafts were right, by the length of the match that made them,
and on the load: one more row is worth its cost while the chance that its token is kept is above the share that a row
has of the step. By the same rule the front decides after which steps the model drafts at all.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from planner.inputs.workload import MAX_DRAFTS

MIN_MATCH = 3
"""Tokens at the end of a history that must occur earlier in it."""
MAX_MATCH = 16
"""Tokens of a match that are compared."""
CANDIDATES = 8
"""Earlier places, the latest first, of which the one with the longest match makes the draft."""
MATCH_CLASSES = (MIN_MATCH, 6, 12)
"""Least lengths of the matches whose drafts are judged together."""
FREE_ROWS = 2.0
"""Rows that cost as much as a step without rows does."""
PAUSE_COST = 0.15
"""Share of a step by which each of its requests is delayed when the step has drafts, because the next one cannot be
made while it runs."""
MEMORY = 8
"""Drafts after which an earlier one counts 1/e for the rate of right ones."""
MAX_WAIT = 8
"""Most steps without a look-up after look-ups that were in vain."""
PASS_LAYERS = 1.2
"""Layers of the model that take as long as a guess of its layer that drafts for each request, with the head."""
PROBE_SHARE = 0.02
"""Share of the time of steps that may go into passes of the layer that drafts which are not known to be worth it."""
MOST_PROBES = 4.0
"""Most such passes that are saved up."""
POOLED_MEMORY = 16
"""Guesses of the model, of all requests, after which an earlier one counts 1/e for the rate of a new request."""
MODEL_CLASS = len(MATCH_CLASSES)
"""The class of drafts that the model made."""
FIRST_RATES = (0.3, 0.6, 0.9, 0.7)
"""Rates of right drafts, by class of match, before any was seen; the last is that of the model's."""
_TOKEN_BYTES = 4


class Draft(NamedTuple):
    """Guesses of the next tokens, the class of the match that made them, and the number of them that the step computes.
    The others are only compared with the tokens that come."""

    tokens: tuple[int, ...]
    match_class: int
    taken: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Drafting:
    """The experience with the drafts of a request: `rates` of right ones by class of match. `history` are its tokens so
    far, int32. It waits `wait` steps until the next look-up, after `pause` steps the last time. `stopped`: a step with
    drafts gave no numbers, so that it gets none any more. `guesses` are the guesses of the model of the tokens after
    the last one."""

    history: bytes = b""
    rates: tuple[float, ...] = FIRST_RATES
    wait: int = 0
    pause: int = 0
    stopped: bool = False
    guesses: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Number of tokens in the history."""
        return len(self.history) // _TOKEN_BYTES

    def extended(self, tokens: Iterable[int]) -> "Drafting":
        """The same with more tokens in the history."""
        return dataclasses.replace(self, history=self.history + np.fromiter(tokens, np.int32).tobytes())

    def waited(self) -> "Drafting":
        """The same after a step without a look-up."""
        return dataclasses.replace(self, wait=self.wait - 1)

    def missed(self) -> "Drafting":
        """The same after a look-up in vain: the next ones come less often."""
        pause = min(max(1, 2 * self.pause), MAX_WAIT)
        return dataclasses.replace(self, wait=pause, pause=pause)

    def guessed(self, draft: Draft | None, sampled: tuple[int, ...], guesses: tuple[int, ...]) -> "Drafting":
        """The same after a step that sampled these tokens, with the model's guesses of those after them. Its guesses of
        the sampled ones are judged, whether the step took them (`draft`) or not."""
        if not (self.guesses or guesses or self.wait or self.pause):
            return self
        taken = 0 if draft is None else draft.taken
        judged = self
        if self.guesses and sampled:
            judged = self.judged(Draft(self.guesses, MODEL_CLASS, taken), sampled)
        return dataclasses.replace(judged, guesses=guesses, wait=0, pause=0)

    def judged(self, draft: Draft, sampled: tuple[int, ...]) -> "Drafting":
        """The same after a step that took a draft, and the tokens that were sampled in its place and after it, up to
        the first that differs."""
        rates, judged = list(self.rates), max(draft.taken, 1)
        rate = rates[draft.match_class]
        hits = 0
        for guess, token in zip(draft.tokens[:judged], sampled, strict=False):
            rate += ((guess == token) - rate) / MEMORY
            hits += guess == token
        rates[draft.match_class] = rate
        after = dataclasses.replace(self, rates=tuple(rates))
        return dataclasses.replace(after, wait=0, pause=0) if hits else after.missed()


NOTHING_DRAFTED = Drafting()
"""Of a request that has just arrived."""


def propose(history: bytes, count: int) -> Draft | None:
    """`count` guesses of the tokens after a history (int32): the tokens that followed the longest earlier occurrence of
    its end, of the last few. A draft that reaches the end of the history goes on with its own tokens, as in a period.
    None when the last MIN_MATCH tokens occur only once."""
    tokens = memoryview(history).cast("i")
    length, ending = len(tokens), history[-MIN_MATCH * _TOKEN_BYTES :]
    best, longest = 0, 0
    for end in _occurrences(history, ending):
        matched = MIN_MATCH
        while matched < MAX_MATCH and matched < end and tokens[end - 1 - matched] == tokens[length - 1 - matched]:
            matched += 1
        if matched > longest:
            best, longest = end, matched
        if longest == MAX_MATCH:
            break
    if not longest:
        return None
    guesses: list[int] = []
    for place in range(best, best + count):
        guesses.append(tokens[place] if place < length else guesses[place - length])
    match_class = sum(longest >= least for least in MATCH_CLASSES) - 1
    return Draft(tuple(guesses), match_class)


def _occurrences(history: bytes, ending: bytes) -> Iterable[int]:
    """The places, as numbers of tokens, after the last CANDIDATES earlier occurrences of the last tokens, the latest
    first."""
    before, found = len(history) - _TOKEN_BYTES, 0
    while found < CANDIDATES and len(ending) == MIN_MATCH * _TOKEN_BYTES:
        at = history.rfind(ending, 0, before)
        if at < 0:
            return
        if at % _TOKEN_BYTES == 0:
            found += 1
            yield at // _TOKEN_BYTES + MIN_MATCH
        before = at + len(ending) - 1


@dataclasses.dataclass(frozen=True, slots=True)
class DraftPasses:
    """When the model's layer that drafts runs. `rate` is that of right guesses of all requests, with which a new one
    begins. `saved` are passes that may be made although the rates known so far do not promise enough: so a rate
    recovers when the text changes, and it is known when the load sinks."""

    rate: float = FIRST_RATES[MODEL_CLASS]
    saved: float = MOST_PROBES
    made: bool = True
    """The step that was scheduled last has a pass."""

    def judged(self, hits: Iterable[bool]) -> "DraftPasses":
        """The same after a step that sampled tokens which the model had guessed, right or not."""
        rate = self.rate
        for hit in hits:
            rate += (hit - rate) / POOLED_MEMORY
        return dataclasses.replace(self, rate=rate)

    def skipped(self, cost: float) -> "DraftPasses":
        """The same after a step without a pass, which would have taken `cost` of the step."""
        saved = min(MOST_PROBES, self.saved + PROBE_SHARE / max(cost, PROBE_SHARE))
        return dataclasses.replace(self, saved=saved, made=False)

    def ran(self, *, probe: bool) -> "DraftPasses":
        """The same after a step with a pass: with `probe` one that was saved up."""
        return dataclasses.replace(self, saved=self.saved - probe, made=True)

    def first_drafting(self) -> Drafting:
        """The experience with drafts that a new request begins with."""
        return Drafting(rates=(*FIRST_RATES[:MODEL_CLASS], self.rate))


class DraftChance(NamedTuple):
    """A request that may get drafts: its rank, the chance that its first draft is right, and that each further one is,
    and the most drafts there is room for."""

    rank: int
    rate: float
    room: int


def may_be_worth(guessed: int, *, most: int, rows: int, requests: int, cost: float) -> bool:
    """Whether `worth_waiting` can hold for guesses for `guessed` requests: it does if all of them are right."""
    return guessed * most * (1 - rows / (FREE_ROWS + rows)) >= (PAUSE_COST + cost) * requests


def worth_waiting(
    rates: Iterable[float], *, most: int, rows: int, requests: int, fixed: int | None, cost: float = 0.0
) -> bool:
    """Whether the next step, of `rows` rows without drafts of so many requests, should wait for the model's guesses:
    they promise more tokens than are lost because it is not made while this step runs, and because making them takes
    `cost` of a step. `rates` are those of the requests that get guesses, at `most` so many each."""
    least, promised, rates = rows / (FREE_ROWS + rows), 0.0, tuple(rates)
    if fixed is None and not may_be_worth(len(rates), most=most, rows=rows, requests=requests, cost=cost):
        return False
    for rate in rates:
        if fixed is not None:
            return True
        chances = (rate**nth for nth in range(1, most + 1))
        promised += sum(chance - least for chance in chances if chance >= least)
    return promised >= (PAUSE_COST + cost) * requests > 0


def choose_counts(
    candidates: Mapping[str, DraftChance], free: Mapping[int, int], *, rows: int, requests: int, fixed: int | None
) -> dict[str, int]:
    """The number of drafts of each request in a step that has `rows` rows without them, of `requests` requests, and
    `free` rows left on each rank. With `fixed`, so many for each, as far as there is room.

    The rows that are most likely to be right come first. Without `fixed` none is taken when all together, less their
    cost, promise fewer tokens than are lost because the next step waits for this one.
    """
    least = rows / (FREE_ROWS + rows)
    wanted: list[tuple[float, int, str]] = []
    for number, (request_id, candidate) in enumerate(candidates.items()):
        chance, most = 1.0, candidate.room if fixed is None else min(fixed, candidate.room)
        for _ in range(min(most, MAX_DRAFTS)):
            chance *= candidate.rate
            if fixed is None and chance < least:
                break
            wanted.append((-chance, number, request_id))
    counts, left, promised = dict.fromkeys(candidates, 0), dict(free), 0.0
    for chance, _, request_id in sorted(wanted):
        if left[candidates[request_id].rank] > 0:
            left[candidates[request_id].rank] -= 1
            counts[request_id] += 1
            promised += -chance - least
    if fixed is None and promised < PAUSE_COST * requests:
        return dict.fromkeys(candidates, 0)
    return counts
