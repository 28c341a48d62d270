"""What the server knows about every open request, and what can happen to it. Values and pure transitions.

A transition takes a state and returns its successor, with outputs where clients must hear of it. `schedule`
(serving/scheduler.py) makes a step, `apply` takes its results in; another step may be made before they are there, from
the state as it will be, in which the tokens of the step in flight are UNKNOWN. Steps that fail in between leave no
trace: go on from the state that the last `schedule` returned, of which `lose` makes the next. Not from one before it:
a rank may have written on pages that `schedule` took from the prefix cache.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Collection, Iterable, Mapping

from serving.batch import UNKNOWN, Batch, Bucket, Result, Work
from serving.errors import InvalidRequest, MoejaxError, NoCapacity, PromptTooLong, QueueFull
from serving.fairness import GENERATED_WEIGHT, Shares
from serving.pages import Key, PagePool, check_pages, page_keys
from serving.request import Finished, FinishReason, Request, Scored, Token
from serving.sequence import Ahead, Salvage, Sequence

Output = tuple[str, Scored | Token | Finished | MoejaxError]
"""What a client hears: scores of its prompt, a token, or the one end of its stream (Finished, or a typed error)."""

QUEUE_RETRY_S = 1.0
"""Hint to a client that found the queue full."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What does not change while the server runs. Sizes in tokens, `max_queue` in requests."""

    page_size: int
    max_context: int
    max_queue: int
    buckets: tuple[Bucket, ...]
    tiles_while_decoding: int
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "buckets", tuple(Bucket(*bucket) for bucket in self.buckets))
        bounds = {"page_size": 1, "max_context": 2, "max_queue": 1, "tiles_while_decoding": 1}
        for name, least in bounds.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if not self.buckets or self.most_decode < 1 or self.most_tiles < 1:
            raise ValueError(f"buckets {self.buckets} need one with decode rows and one with prefill tiles.")
        if (self.most_decode, self.most_tiles) not in self.buckets:
            raise ValueError(
                f"no bucket covers {self.most_decode} decode rows with {self.most_tiles} tiles. "
                f"Add ({self.most_decode}, {self.most_tiles}) to the buckets."
            )

    @property
    def most_decode(self) -> int:
        """Decode rows of the largest bucket: the most sequences a rank runs."""
        return max((bucket.decode for bucket in self.buckets), default=0)

    @property
    def most_tiles(self) -> int:
        """Prefill tiles of the largest bucket."""
        return max((bucket.tiles for bucket in self.buckets), default=0)

    @property
    def max_pages(self) -> int:
        """Pages of the longest sequence: the width of a page table."""
        return self.pages_for(self.max_context)

    def pages_for(self, positions: int) -> int:
        """Pages that hold so many positions."""
        return -(-positions // self.page_size)

    def pages_needed(self, request: Request) -> int:
        """Pages of a request that runs to its end. Its last token is never written to the cache."""
        length = len(request.prompt)
        return self.pages_for(max(length, min(length + request.max_tokens, self.max_context) - 1))


@dataclasses.dataclass(frozen=True)
class EngineState:
    """All requests between acceptance and end. `waiting` is in order of arrival; mappings never change."""

    limits: Limits
    pools: Mapping[int, PagePool]
    epoch: int = 0
    waiting: Mapping[str, Sequence] = dataclasses.field(default_factory=dict)
    running: Mapping[str, Sequence] = dataclasses.field(default_factory=dict)
    step: int = 0
    """Steps made so far."""
    in_flight: tuple[int, ...] = ()
    """Steps whose results are awaited, in this order; results of any other are refused."""
    arrivals: int = 0
    preemptions: int = 0
    decode_first: bool = False
    """After a loss, until one step has gone to the survivors' streams alone."""
    root: Key = b""
    """What the key of every first page depends on: which experts answered."""
    prefix_queries: int = 0
    """Prompt tokens looked up in the prefix cache so far."""
    prefix_hits: int = 0
    """Of these, found there."""
    shares: Shares = dataclasses.field(default_factory=Shares)
    """What each owner of requests has been served."""
    admitted: int = 0
    """Requests that got their first place so far."""
    closed: frozenset[int] = frozenset()
    """Ranks that are to go: they take no more requests."""

    @classmethod
    def start(cls, limits: Limits, pages: Mapping[int, int], *, epoch: int = 0) -> "EngineState":
        """No requests, and an empty cache of `pages[rank]` pages on every rank."""
        return cls(limits, {rank: PagePool.of(count) for rank, count in pages.items()}, epoch)

    def find(self, request_id: str) -> Sequence | None:
        """The open request of that id."""
        return self.running.get(request_id) or self.waiting.get(request_id)


def submit(state: EngineState, request: Request, *, retry_after_s: float = QUEUE_RETRY_S) -> EngineState:
    """Accept a request into the queue. An owner with a name may take as many places in it as are free, so that there
    are some for others.

    Raises PromptTooLong, InvalidRequest (empty prompt, max_tokens below 1, id in use, more pages than a rank
    has) and QueueFull, with `retry_after_s` in it.
    """
    _check_request(state, request)
    free = state.limits.max_queue - len(state.waiting)
    owners = collections.Counter(sequence.request.owner for sequence in state.waiting.values())
    own = owners.get(request.owner, 0)
    if free < 1:
        raise QueueFull(
            f"{len(state.waiting)} requests are waiting and the queue holds {state.limits.max_queue}. "
            "Try again later, or raise max_queue.",
            retry_after_s=retry_after_s,
        )
    if request.owner and own >= free:
        raise QueueFull(
            f"{own} requests of the key {request.owner!r} are waiting, and {free} of {state.limits.max_queue} places "
            "in the queue are left for others. Try again later.",
            retry_after_s=retry_after_s,
        )
    waiting = {**state.waiting, request.id: Sequence(request, state.arrivals)}
    shares = state.shares.arrived(request.owner, owners)
    return dataclasses.replace(state, waiting=waiting, arrivals=state.arrivals + 1, shares=shares)


def resubmit(
    state: EngineState, request: Request, *, generated: tuple[int, ...], scored: int, reused: int | None
) -> tuple[EngineState, tuple[Output, ...]]:
    """Take up a request that was accepted before, with the tokens and scores its client has. It ends at once when it
    has all of them, or when no rank can hold it."""
    reason = _reason_of_length(state.limits, request, len(generated)) if generated else None
    if reason is not None:
        return state, ((request.id, Finished(reason, reused or 0)),)
    try:
        _check_request(state, request)
    except MoejaxError as error:
        return state, ((request.id, error),)
    sequence = Sequence(request, state.arrivals, generated, reused, scored)
    owners = collections.Counter(other.request.owner for other in state.waiting.values())
    shares = state.shares.arrived(request.owner, owners)
    waiting = {**state.waiting, request.id: sequence}
    return dataclasses.replace(state, waiting=waiting, arrivals=state.arrivals + 1, shares=shares), ()


def cancel(
    state: EngineState, request_id: str, reason: FinishReason = "cancelled"
) -> tuple[EngineState, tuple[Output, ...]]:
    """End a request for a reason the front found: the caller left, a stop string. Unknown ids end nothing."""
    if state.find(request_id) is None:
        return state, ()
    return _without(state, [request_id]), ((request_id, Finished(reason)),)


def expire(state: EngineState, now: float) -> tuple[EngineState, tuple[Output, ...]]:
    """End the requests whose deadline is not after `now`."""
    late = [
        sequence.id
        for sequence in (*state.running.values(), *state.waiting.values())
        if sequence.request.deadline is not None and sequence.request.deadline <= now
    ]
    if not late:
        return state, ()
    return _without(state, late), tuple((request_id, Finished("deadline")) for request_id in late)


def apply(state: EngineState, batch: Batch, results: Mapping[str, Result]) -> tuple[EngineState, tuple[Output, ...]]:
    """Take in a step: `results` by request id, of all its work that samples or has targets.

    Requests that ended while the step ran are passed over. Raises ValueError when the step is not the one in
    flight: it is of an old epoch, or its results are in already.
    """
    if batch.step != next(iter(state.in_flight), None):
        raise ValueError(f"results of step {batch.step} came, but steps {list(state.in_flight)} are in flight.")
    running, pools, outputs, ended = dict(state.running), dict(state.pools), [], []
    costs: dict[str, float] = {}
    for work in (work for part in batch.work.values() for work in part):
        sequence = running.get(work.request_id)
        if sequence is None or next((each.step for each in sequence.ahead), None) != batch.step:
            continue
        result = results.get(work.request_id)
        sequence, told, reason = _advanced(state.limits, sequence, work, result, batch)
        outputs += ((work.request_id, item) for item in told)
        made = sequence.known - running[work.request_id].known
        owner, cost = sequence.request.owner, made * GENERATED_WEIGHT / sequence.request.share
        costs[owner] = costs.get(owner, 0.0) + cost
        assert sequence.rank is not None
        running[work.request_id], pools[sequence.rank] = sealed(state, sequence, pools[sequence.rank])
        if reason is not None:
            outputs.append((work.request_id, Finished(reason, sequence.reused or 0)))
            ended.append(work.request_id)
    state = dataclasses.replace(
        state, running=running, pools=pools, in_flight=state.in_flight[1:], shares=state.shares.charged(costs)
    )
    return (_without(state, ended) if ended else state), tuple(outputs)


def foreseen(state: EngineState, batch: Batch) -> EngineState:
    """The state once the step is in, as far as that is known: what was computed then, and that there will be tokens."""
    running = dict(state.running)
    for work in (work for part in batch.work.values() for work in part):
        sequence = running[work.request_id]
        samples = work.samples and sequence.request.max_tokens > 0
        generated = (*sequence.generated, UNKNOWN) if samples else sequence.generated
        full = _reason_of_length(state.limits, sequence.request, len(generated)) is not None
        running[work.request_id] = dataclasses.replace(
            sequence,
            generated=generated,
            computed=work.start + len(work.tokens),
            ahead=(*sequence.ahead, Ahead(batch.step, work.start, samples, last=work.samples and full)),
        )
    return dataclasses.replace(state, running=running, in_flight=(*state.in_flight, batch.step))


def is_foreseeable(state: EngineState) -> bool:
    """Whether the next step can be made before the results of the one in flight are there: no choice of a token
    depends on which tokens those are."""
    return not any(
        sequence.request.is_shaped(len(sequence.generated))
        for sequence in state.running.values()
        if sequence.known < len(sequence.generated)
    )


def _advanced(
    limits: Limits, sequence: Sequence, work: Work, result: Result | None, batch: Batch
) -> tuple[Sequence, list[Scored | Token], FinishReason | None]:
    """A sequence after its work was done, what its client hears of it, and why it ends if it does."""
    told: list[Scored | Token] = []
    reason: FinishReason | None = None
    generated, scored, known = sequence.generated, sequence.scored, sequence.known
    if work.targets:
        assert result is not None
        logprobs, top = zip(*result.scores, strict=True)
        told.append(Scored(scored + 1, logprobs, top))
        scored += len(logprobs)
    if work.samples and sequence.request.max_tokens == 0:
        reason = "length"
    elif work.samples:
        assert result is not None
        if result.token in sequence.request.stop_tokens:
            reason = "stop"
        else:
            told.append(
                Token(
                    known,
                    result.token,
                    result.logprob,
                    batch.epoch,
                    batch.degraded,
                    result.top,
                    sequence.reused or 0,
                )
            )
            generated = (*generated[:known], result.token, *generated[known + 1 :])
            reason = _reason_of_length(limits, sequence.request, known + 1)
    return dataclasses.replace(sequence, generated=generated, scored=scored, ahead=sequence.ahead[1:]), told, reason


def lose(state: EngineState, dead: Collection[int], salvage: Mapping[str, Salvage] | None = None) -> EngineState:
    """Ranks died: their requests go to the front of the queue as prompt + tokens so far. None is sent again.

    Steps in flight are forgotten: their results will be refused and their work is scheduled again. `salvage`
    is what outlived the ranks, by request; one that was being restored keeps what it is restored from.
    """
    found = salvage or {}
    lost = [
        dataclasses.replace(sequence, salvage=found.get(sequence.id, sequence.salvage))
        for sequence in state.running.values()
        if sequence.rank in dead
    ]
    return dataclasses.replace(
        state,
        pools={rank: pool for rank, pool in state.pools.items() if rank not in dead},
        running={key: each.withdrawn() for key, each in state.running.items() if each.rank not in dead},
        waiting=requeued(state.waiting, lost),
        in_flight=(),
        decode_first=True,
    )


def adopt(
    state: EngineState,
    pages: Mapping[int, int],
    *,
    epoch: int,
    fresh: Collection[int] = (),
    masked: Iterable[tuple[int, int]] = (),
    known: Mapping[int, Mapping[int, Key]] | None = None,
) -> tuple[EngineState, tuple[Output, ...]]:
    """The ranks of a new epoch and their pages. A rank known before keeps its cache and its requests.

    A rank has an empty cache when it is new, in `fresh`, or has another number of pages than before; but for the pages
    that are `known` of a new one, which has served before. A
    request that no rank can hold any more ends with NoCapacity; without any rank all requests wait. Prefixes
    are found only by requests that run with the same experts `masked`, (layer, expert), as those that made them.
    """
    state = _rooted(state, frozenset(masked))
    emptied = {rank for rank, pool in state.pools.items() if rank in fresh or pages.get(rank) != pool.total}
    decode_first = state.decode_first or bool(emptied)
    state = lose(state, emptied)
    known = known or {}
    pools = {
        rank: state.pools.get(rank) or PagePool.holding(count, known.get(rank, {})) for rank, count in pages.items()
    }
    state = dataclasses.replace(state, pools=pools, epoch=epoch, decode_first=decode_first)
    most = max(pages.values(), default=None)
    if most is None:
        return state, ()
    outputs: list[Output] = []
    for sequence in state.waiting.values():
        need = state.limits.pages_needed(sequence.request)
        if need > most:
            message = (
                f"the request needs {need} pages and the ranks alive have {most} each. "
                "Bring a rank with more memory back, or ask for fewer tokens."
            )
            outputs.append((sequence.id, NoCapacity(message)))
    return _without(state, [request_id for request_id, _ in outputs]), tuple(outputs)


def _rooted(state: EngineState, masked: Collection[tuple[int, int]]) -> EngineState:
    """The state after the experts that answer changed: what runs has been made by others in part."""
    root = hashlib.blake2b(repr(sorted(masked)).encode(), digest_size=16).digest() if masked else b""
    if root == state.root:
        return state
    running = {key: dataclasses.replace(_mixed(sequence), chain=None) for key, sequence in state.running.items()}
    waiting = {key: _mixed(sequence) for key, sequence in state.waiting.items()}
    return dataclasses.replace(state, root=root, running=running, waiting=waiting)


def _mixed(sequence: Sequence) -> Sequence:
    """The sequence, of which nobody else may use what was salvaged."""
    if sequence.salvage is None:
        return sequence
    return dataclasses.replace(sequence, salvage=dataclasses.replace(sequence.salvage, chain=None))


def sealed(state: EngineState, sequence: Sequence, pool: PagePool) -> tuple[Sequence, PagePool]:
    """The sequence and its rank's pool after its full pages were made known."""
    size, chain = state.limits.page_size, sequence.chain
    if not state.limits.prefix_caching or chain is None or sequence.settled // size == len(chain):
        return sequence, pool
    start, before = len(chain) * size, chain[-1] if chain else state.root
    fresh = page_keys(sequence.tokens(start, sequence.settled), size, before)
    for page, key in zip(sequence.pages[len(chain) :], fresh, strict=False):
        pool = pool.seal(page, key)
    return dataclasses.replace(sequence, chain=chain + fresh), pool


def requeued(waiting: Mapping[str, Sequence], sequences: Iterable[Sequence]) -> dict[str, Sequence]:
    """The queue with these sequences taken off their ranks. They arrived first: they stand first."""
    back = [sequence.displaced() for sequence in sequences]
    merged = sorted((*back, *waiting.values()), key=lambda sequence: sequence.arrival)
    return {sequence.id: sequence for sequence in merged}


def check_integrity(state: EngineState) -> None:
    """Raise AssertionError unless pages, places and requests are conserved."""
    both = state.waiting.keys() & state.running.keys()
    assert not both, f"{both} are waiting and running"
    arrivals = [sequence.arrival for sequence in state.waiting.values()]
    assert arrivals == sorted(arrivals), f"the queue is out of order: {arrivals}"
    everyone = [*state.waiting.items(), *state.running.items()]
    assert len({sequence.arrival for _, sequence in everyone}) == len(everyone), "two requests, one arrival"
    for key, sequence in everyone:
        request = sequence.request
        assert key == sequence.id
        assert sequence.arrival < state.arrivals, f"{key} arrived as {sequence.arrival} of {state.arrivals}"
        assert not request.stop_tokens.intersection(sequence.generated), f"{key} is past its stop token"
        over = sequence.known and _reason_of_length(state.limits, request, sequence.known)
        assert not over, f"{key} has all its tokens and is still open"
    for sequence in state.waiting.values():
        assert sequence == sequence.displaced(), f"{sequence.id} waits and holds {sequence.pages}"
    for sequence in state.running.values():
        assert sequence.rank in state.pools, f"{sequence.id} runs on rank {sequence.rank}, which is not there"
        assert sequence.pending >= 1 or sequence.ending, f"{sequence.id} has nothing to compute"
        room = len(sequence.pages) * state.limits.page_size
        assert sequence.computed <= room, f"{sequence.id} has {sequence.computed} entries in room for {room}"
    for rank, pool in state.pools.items():
        here = [sequence for sequence in state.running.values() if sequence.rank == rank]
        most = state.limits.most_decode
        assert len(here) <= most, f"rank {rank} runs {len(here)} sequences, its rows are {most}"
        check_pages(pool, [page for sequence in here for page in sequence.pages])
        for sequence in here:
            for page in sequence.pages[sequence.settled // state.limits.page_size :]:
                assert pool.holders[page] == 1, f"{sequence.id} will write on page {page}, which others read"
                assert page not in pool.keys, f"{sequence.id} will write on page {page}, which is sealed"


def _check_request(state: EngineState, request: Request) -> None:
    limits, length = state.limits, len(request.prompt)
    if length == 0:
        raise InvalidRequest("the prompt has no tokens. Send at least 1.", param="prompt")
    scored_only = request.max_tokens == 0 and request.prompt_logprobs is not None
    if length >= limits.max_context + scored_only:
        raise PromptTooLong(
            f"the prompt has {length} tokens and the context holds {limits.max_context}, one of them for the "
            f"answer. Shorten the prompt to {limits.max_context - 1}.",
            param="prompt",
        )
    if request.max_tokens < 1 and not scored_only:
        raise InvalidRequest(f"max_tokens is {request.max_tokens}. Ask for at least 1.", param="max_tokens")
    if state.find(request.id) is not None:
        raise InvalidRequest(f"request id {request.id!r} is in use. Choose another.", param="request_id")
    need = limits.pages_needed(request)
    most = max((pool.total for pool in state.pools.values()), default=need)
    if need > most:
        raise InvalidRequest(
            f"{length} prompt tokens and max_tokens {request.max_tokens} need {need} pages of "
            f"{limits.page_size} tokens; a rank has {most}. Lower max_tokens or raise pages_per_rank.",
            param="max_tokens",
        )


def _reason_of_length(limits: Limits, request: Request, generated: int) -> FinishReason | None:
    full = generated >= request.max_tokens or len(request.prompt) + generated >= limits.max_context
    return "length" if full else None


def _without(state: EngineState, request_ids: Iterable[str]) -> EngineState:
    """The state after these requests ended: their pages are free again."""
    waiting, running, pools = dict(state.waiting), dict(state.running), dict(state.pools)
    for request_id in request_ids:
        sequence = running.pop(request_id, None) or waiting.pop(request_id)
        if sequence.rank is not None:
            pools[sequence.rank] = pools[sequence.rank].release(sequence.pages)
    return dataclasses.replace(state, waiting=waiting, running=running, pools=pools)
