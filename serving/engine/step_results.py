"""Transitions of a step: the state while its results are awaited, and after them."""

import dataclasses
from collections.abc import Mapping

from serving.engine.batch import PLACEHOLDER_TOKEN, Batch, ScheduledRequest, StepResult
from serving.engine.draft_passes import should_wait
from serving.engine.fairness import GENERATED_WEIGHT
from serving.engine.limits import Limits
from serving.engine.sequence import InFlightStep, Sequence
from serving.engine.snapshot_steps import keep_snapshots
from serving.engine.speculation import Draft
from serving.engine.state import EngineState, Output, remove_requests, seal_full_pages
from serving.errors import NoTokenAllowed
from serving.protocol.request import Finished, FinishReason, Scored, Token


def apply(
    state: EngineState, batch: Batch, results: Mapping[str, StepResult]
) -> tuple[EngineState, tuple[Output, ...]]:
    """Take in the results of a step, by request id, for all its requests that sample or have targets.

    Requests that ended while the step ran are ignored. Raises ValueError when the step is not the one whose results
    are awaited: it is of an old epoch, or its results are in already.
    """
    if batch.step != next(iter(state.in_flight), None):
        raise ValueError(f"results of step {batch.step} came, but steps {list(state.in_flight)} are in flight.")
    running, pools, outputs, ended = dict(state.running), dict(state.pools), [], []
    costs: dict[str, float] = {}
    drafts = drafted = accepted = 0
    hits: list[bool] = []
    for work in (work for part in batch.scheduled.values() for work in part):
        sequence = running.get(work.request_id)
        if sequence is None or next((each.step for each in sequence.in_flight), None) != batch.step:
            continue
        result = results.get(work.request_id)
        if work.samples and result is not None and sequence.drafting.guesses:
            hits.append(sequence.drafting.guesses[0] == result.token)
        sequence, items, end = _advanced(state.limits, sequence, work, result, batch)
        outputs += ((work.request_id, item) for item in items)
        accepted += sum(isinstance(item, Token) and item.drafted for item in items)
        drafts += bool(work.drafts)
        drafted += len(work.drafts)
        made = sequence.known_tokens - running[work.request_id].known_tokens
        owner, cost = sequence.request.owner, made * GENERATED_WEIGHT / sequence.request.share
        costs[owner] = costs.get(owner, 0.0) + cost
        assert sequence.rank is not None
        rank = sequence.rank
        sequence, pool = seal_full_pages(state, sequence, pools[rank])
        if work.snapshots:
            sequence, pool = keep_snapshots(sequence, work.snapshots, pool, state.limits.page_size)
        running[work.request_id], pools[rank] = sequence, pool
        if end is not None:
            outputs.append((work.request_id, end))
            ended.append(work.request_id)
    state = dataclasses.replace(
        state,
        running=running,
        pools=pools,
        in_flight=state.in_flight[1:],
        counters=state.counters.charge(costs),
        drafts=state.drafts + drafts,
        drafted=state.drafted + drafted,
        accepted=state.accepted + accepted,
        draft_passes=state.draft_passes.judged(hits),
        draft_passes_skipped=state.draft_passes_skipped + batch.skip_drafts,
    )
    state = remove_requests(state, ended) if ended else state
    if state.suspicion.incidents:
        committed = dict.fromkeys(state.waiting, 0) | {key: each.committed for key, each in state.running.items()}
        state = dataclasses.replace(state, suspicion=state.suspicion.settle(committed))
    return state, tuple(outputs)


def look_ahead(state: EngineState, batch: Batch, drafts: Mapping[str, Draft]) -> EngineState:
    """The state with the step in flight: its tokens count as computed, and the tokens it will sample are
    placeholders. Those of rows of drafts count neither way until the results are in."""
    running = dict(state.running)
    for work in (work for part in batch.scheduled.values() for work in part):
        sequence = running[work.request_id]
        samples = work.samples and sequence.request.sampling.max_tokens > 0
        generated = (*sequence.generated, PLACEHOLDER_TOKEN) if samples else sequence.generated
        full = state.limits.length_reason(sequence.request, len(generated)) is not None
        end = work.start + len(work.tokens)
        running[work.request_id] = dataclasses.replace(
            sequence,
            generated=generated,
            computed=end,
            turns=sequence.turns + 1,
            snapshot=next((each.place for each in work.snapshots if each.position == end), None),
            in_flight=(
                *sequence.in_flight,
                InFlightStep(
                    batch.step,
                    work.start,
                    samples,
                    last=work.samples and full,
                    draft=drafts.get(work.request_id),
                    snapshot=sequence.snapshot,
                    snapshots=work.snapshots,
                ),
            ),
        )
    return dataclasses.replace(state, running=running, in_flight=(*state.in_flight, batch.step))


def can_look_ahead(state: EngineState) -> bool:
    """Whether the next step can be scheduled before the results of the one in flight are there: no logits processing
    depends on a token in flight, the number of tokens in flight is known, no suspect runs in steps of its own, and the
    guesses that the model makes in that step are not worth waiting for."""
    in_flight = [each for each in state.running.values() if each.known_tokens < len(each.generated)]
    if state.suspicion.suspects or any(
        sequence.speculating or sequence.request.sampling.needs_logits_processing(len(sequence.generated))
        for sequence in in_flight
    ):
        return False
    return not should_wait(state, [each for each in in_flight if not each.ending])


def _no_token_allowed(sequence: Sequence, made: int) -> NoTokenAllowed:
    sampling = sequence.request.sampling
    used = {
        "logit_bias": bool(sampling.logit_bias),
        "min_tokens": made < sampling.min_tokens,
        "structured_outputs": sampling.structured_outputs is not None,
    }
    names = [name for name, is_used in used.items() if is_used]
    return NoTokenAllowed(
        f"after {made} tokens no token is allowed: {' and '.join(names) or 'its filters'} exclude all of "
        "them. Relax one of them.",
        param=names[0] if names else None,
    )


def _advanced(
    limits: Limits, sequence: Sequence, work: ScheduledRequest, result: StepResult | None, batch: Batch
) -> tuple[Sequence, list[Scored | Token], Finished | NoTokenAllowed | None]:
    """The sequence after a step, the items for its client, and its end, if it ends."""
    items: list[Scored | Token] = []
    reason: FinishReason | None = None
    generated, scored, known = sequence.generated, sequence.scored, sequence.known_tokens
    drafting, sampled = sequence.drafting, list[StepResult]()
    if work.targets:
        assert result is not None
        logprobs, top = zip(*result.scores, strict=True)
        items.append(Scored(scored + 1, logprobs, top))
        scored += len(logprobs)
    if work.samples and sequence.request.sampling.max_tokens == 0:
        reason = "length"
    elif work.samples:
        assert result is not None
        sampled = _kept(work.drafts, result)
        for nth, each in enumerate(sampled):
            if each.token < 0:
                return sequence, items, _no_token_allowed(sequence, known + nth)
            if each.token in sequence.request.sampling.stop_tokens:
                reason = "stop"
                break
            cached, drafted = sequence.cached_tokens or 0, nth < len(work.drafts) and each.token == work.drafts[nth]
            items.append(
                Token(
                    known + nth,
                    each.token,
                    each.logprob,
                    batch.epoch,
                    batch.degraded,
                    each.top,
                    cached,
                    drafted,
                    batch.weights_version,
                )
            )
            reason = limits.length_reason(sequence.request, known + nth + 1)
            if reason is not None:
                break
        tokens = [item.id for item in items if isinstance(item, Token)]
        generated = (*generated[:known], *tokens, *generated[known + 1 :])
        draft, tokens_sampled = sequence.in_flight[0].draft, tuple(each.token for each in sampled)
        if limits.model_drafts:
            drafting = drafting.guessed(draft, tokens_sampled, sampled[-1].guesses)
        elif draft is not None:
            drafting = drafting.judged(draft, tokens_sampled)
    advanced = dataclasses.replace(
        sequence,
        generated=generated,
        scored=scored,
        computed=sequence.computed + max(len(sampled) - 1, 0),
        in_flight=sequence.in_flight[1:],
        drafting=drafting,
    )
    return advanced, items, None if reason is None else Finished(reason, sequence.cached_tokens or 0)


def _kept(drafts: tuple[int, ...], result: StepResult) -> list[StepResult]:
    """The results that count: that of the last token, and each one after a draft that is the token sampled there. One
    without a token does not count after a draft: the next step decides whether none is allowed."""
    kept = [result]
    for draft, after in zip(drafts, result.after_drafts, strict=True):
        if draft != kept[-1].token or after.token < 0:
            break
        kept.append(after)
    return kept
