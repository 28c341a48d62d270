"""Adds rows of drafts to a step: for which requests, how many, and the pages they are written on."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from planner.cost.buckets import covering_bucket
from planner.inputs.workload import MAX_DRAFTS
from serving.engine.batch import Batch, ScheduledRequest, required_bucket
from serving.engine.limits import Limits
from serving.engine.page_pool import PagePool
from serving.engine.poison import Suspicion
from serving.engine.sequence import Sequence
from serving.engine.speculation import MODEL_CLASS, Draft, DraftChance, choose_counts, propose
from serving.engine.state import EngineState

Work = Mapping[int, tuple[ScheduledRequest, ...]]


class DraftedStep(NamedTuple):
    """The work of a step with drafts, and the sequences and pools that belong to it. `drafts` has the guesses that are
    judged by the results of the step, by request."""

    ranks: dict[int, list[Sequence]]
    pools: dict[int, PagePool]
    work: Work
    drafts: Mapping[str, Draft]


def add_drafts(
    limits: Limits,
    suspicion: Suspicion,
    ranks: dict[int, list[Sequence]],
    pools: dict[int, PagePool],
    work: Work,
) -> DraftedStep:
    """The step with drafts for its decode rows.

    They take rows that no request needs, need no bucket with more tiles, and leave a page for every request of their
    rank. A request that is suspected of breaking ranks has none. They are for models whose whole context is in pages:
    a state that a layer has taken further cannot be taken back.
    """
    if not any(limits.speculates(sequence.request) for sequences in ranks.values() for sequence in sequences):
        return DraftedStep(ranks, pools, work, {})
    free = _free_rows(limits, work)
    drafting = dict(_look_ups(limits, suspicion, ranks, work, free))
    if not drafting:
        return DraftedStep(ranks, pools, work, {})
    drafts = {key: draft for key, (_, draft) in drafting.items() if draft is not None}
    candidates = dict[str, DraftChance]()
    for key, draft in drafts.items():
        sequence, _ = drafting[key]
        assert sequence.rank is not None
        rate = sequence.drafting.rates[draft.match_class]
        candidates[key] = DraftChance(sequence.rank, rate, len(draft.tokens))
    counts = choose_counts(
        candidates,
        free,
        rows=sum(item.rows for part in work.values() for item in part),
        requests=sum(map(len, work.values())),
        fixed=limits.draft_tokens,
    )
    pools, placed = dict(pools), dict[str, Sequence]()
    for key, (sequence, draft) in drafting.items():
        if draft is None:
            placed[key] = sequence
            continue
        assert sequence.rank is not None
        spare = pools[sequence.rank].available - len(ranks[sequence.rank])
        sequence, pools[sequence.rank], count = _with_pages(limits, sequence, pools[sequence.rank], counts[key], spare)
        placed[key], drafts[key] = sequence, draft._replace(taken=count)
    return DraftedStep(
        {rank: [placed.get(each.id, each) for each in sequences] for rank, sequences in ranks.items()},
        pools,
        {rank: tuple(_with_drafts(item, placed, drafts) for item in part) for rank, part in work.items()},
        drafts,
    )


def stop_drafting(state: EngineState, batch: Batch, ranks: Iterable[int]) -> EngineState:
    """The state after a step gave no numbers on these ranks: its requests that had drafts there get none any more. A
    guess that the model would never make may be the cause."""
    ids = {item.request_id for rank in ranks for item in batch.scheduled.get(rank, ()) if item.drafts}
    running = {
        key: dataclasses.replace(each, drafting=dataclasses.replace(each.drafting, stopped=True))
        if key in ids
        else each
        for key, each in state.running.items()
    }
    return dataclasses.replace(state, running=running) if ids else state


def _free_rows(limits: Limits, work: Work) -> dict[int, int]:
    """Decode rows of each rank that are left for drafts: in a step whose bucket has tiles those of the bucket, else
    those of the largest without tiles."""
    bucket = covering_bucket(limits.buckets, required_bucket(work.values()))
    rows = bucket.decode if bucket.tiles else max(each.decode for each in limits.buckets if not each.tiles)
    return {rank: rows - sum(item.rows for item in part if not item.tiles) for rank, part in work.items()}


def _look_ups(
    limits: Limits, suspicion: Suspicion, ranks: Mapping[int, list[Sequence]], work: Work, free: Mapping[int, int]
) -> Iterator[tuple[str, tuple[Sequence, Draft | None]]]:
    """For each request that may have drafts, its sequence after the look-up and the guesses, None without any."""
    for rank, part in work.items():
        decoding = {item.request_id for item in part if not item.tiles and item.samples}
        for sequence in ranks[rank] if free[rank] > 0 else ():
            if sequence.id not in decoding or sequence.drafting.stopped or not limits.speculates(sequence.request):
                continue
            if limits.model_drafts and not sequence.drafting.guesses:
                continue
            sampling, made = sequence.request.sampling, len(sequence.generated)
            if sampling.needs_logits_processing(made + 1) and not sampling.needs_logits_processing(made):
                continue  # the first penalty is of the token after this one
            room = min(MAX_DRAFTS, limits.tokens_left(sequence.request, made) - 1)
            if room < 1 or suspicion.weight_of(sequence.id):
                continue
            yield sequence.id, _guessed(sequence, room) if limits.model_drafts else _looked_up(sequence, room)


def _guessed(sequence: Sequence, room: int) -> tuple[Sequence, Draft | None]:
    """The sequence and at most `room` of the model's guesses; None while a token before them is not known."""
    known = len(sequence.generated) == sequence.known_tokens
    tokens = _until_stop(sequence, sequence.drafting.guesses[:room] if known else ())
    return sequence, Draft(tokens, MODEL_CLASS) if tokens else None


def _until_stop(sequence: Sequence, tokens: tuple[int, ...]) -> tuple[int, ...]:
    """The guesses before the first that would end the request."""
    stops = [n for n, token in enumerate(tokens) if token in sequence.request.sampling.stop_tokens]
    return tokens[: stops[0]] if stops else tokens


def _looked_up(sequence: Sequence, room: int) -> tuple[Sequence, Draft | None]:
    """The sequence after a look-up for at most `room` tokens after the next one, and the guesses."""
    drafting = sequence.drafting
    if drafting.wait:
        return dataclasses.replace(sequence, drafting=drafting.waited()), None
    unknown = len(sequence.generated) - sequence.known_tokens
    known = sequence.length - unknown
    if drafting.length < known:
        drafting = drafting.extended(sequence.tokens(drafting.length, known))
    draft = propose(drafting.history, unknown + room)
    tokens = () if draft is None else _until_stop(sequence, draft.tokens[unknown:])
    if draft is None or not tokens:
        return dataclasses.replace(sequence, drafting=drafting.missed()), None
    return dataclasses.replace(sequence, drafting=drafting), draft._replace(tokens=tokens)


def _with_pages(
    limits: Limits, sequence: Sequence, pool: PagePool, count: int, spare: int
) -> tuple[Sequence, PagePool, int]:
    """The sequence and its pool with the pages for its last token and `count` drafts, or for as many drafts as find
    room with at most `spare` more pages; and their number."""
    last = sequence.computed + 1
    more = min(limits.pages_for(last + count) - len(sequence.pages), max(spare, 0))
    if more > 0:
        pool, pages = pool.alloc(more)
        sequence = dataclasses.replace(sequence, pages=sequence.pages + pages)
    return sequence, pool, min(count, len(sequence.pages) * limits.page_size - last)


def _with_drafts(
    item: ScheduledRequest, placed: Mapping[str, Sequence], drafts: Mapping[str, Draft]
) -> ScheduledRequest:
    draft = drafts.get(item.request_id)
    if draft is None or not draft.taken:
        return item
    pages = placed[item.request_id].pages
    return dataclasses.replace(item, pages=pages, drafts=draft.tokens[: draft.taken])
