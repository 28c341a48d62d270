"""Transitions of a step: the state while its results are awaited, and after them."""

import dataclasses
from collections.abc import Mapping

from serving.engine.batch import PLACEHOLDER_TOKEN, Batch, ScheduledRequest, StepResult
from serving.engine.fairness import GENERATED_WEIGHT
from serving.engine.limits import Limits
from serving.engine.sequence import InFlightStep, Sequence
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
    for work in (work for part in batch.scheduled.values() for work in part):
        sequence = running.get(work.request_id)
        if sequence is None or next((each.step for each in sequence.in_flight), None) != batch.step:
            continue
        result = results.get(work.request_id)
        if result is not None and work.samples and sequence.request.sampling.max_tokens and result.token < 0:
            outputs.append((work.request_id, _no_token_allowed(sequence)))
            ended.append(work.request_id)
            continue
        sequence, items, reason = _advanced(state.limits, sequence, work, result, batch)
        outputs += ((work.request_id, item) for item in items)
        made = sequence.known_tokens - running[work.request_id].known_tokens
        owner, cost = sequence.request.owner, made * GENERATED_WEIGHT / sequence.request.share
        costs[owner] = costs.get(owner, 0.0) + cost
        assert sequence.rank is not None
        running[work.request_id], pools[sequence.rank] = seal_full_pages(state, sequence, pools[sequence.rank])
        if reason is not None:
            outputs.append((work.request_id, Finished(reason, sequence.cached_tokens or 0)))
            ended.append(work.request_id)
    state = dataclasses.replace(
        state, running=running, pools=pools, in_flight=state.in_flight[1:], counters=state.counters.charge(costs)
    )
    state = remove_requests(state, ended) if ended else state
    if state.suspicion.incidents:
        committed = dict.fromkeys(state.waiting, 0) | {key: each.committed for key, each in state.running.items()}
        state = dataclasses.replace(state, suspicion=state.suspicion.settle(committed))
    return state, tuple(outputs)


def look_ahead(state: EngineState, batch: Batch) -> EngineState:
    """The state with the step in flight: its tokens count as computed, and the tokens it will sample are
    placeholders."""
    running = dict(state.running)
    for work in (work for part in batch.scheduled.values() for work in part):
        sequence = running[work.request_id]
        samples = work.samples and sequence.request.sampling.max_tokens > 0
        generated = (*sequence.generated, PLACEHOLDER_TOKEN) if samples else sequence.generated
        full = state.limits.length_reason(sequence.request, len(generated)) is not None
        running[work.request_id] = dataclasses.replace(
            sequence,
            generated=generated,
            computed=work.start + len(work.tokens),
            in_flight=(*sequence.in_flight, InFlightStep(batch.step, work.start, samples, last=work.samples and full)),
        )
    return dataclasses.replace(state, running=running, in_flight=(*state.in_flight, batch.step))


def can_look_ahead(state: EngineState) -> bool:
    """Whether the next step can be scheduled before the results of the one in flight are there: no logits processing
    depends on a token in flight, and no suspect runs in steps of its own."""
    return not state.suspicion.suspects and not any(
        sequence.request.sampling.needs_logits_processing(len(sequence.generated))
        for sequence in state.running.values()
        if sequence.known_tokens < len(sequence.generated)
    )


def _no_token_allowed(sequence: Sequence) -> NoTokenAllowed:
    sampling, made = sequence.request.sampling, sequence.known_tokens
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
) -> tuple[Sequence, list[Scored | Token], FinishReason | None]:
    """The sequence after a step, the items for its client, and the reason it ends, if it does."""
    items: list[Scored | Token] = []
    reason: FinishReason | None = None
    generated, scored, known = sequence.generated, sequence.scored, sequence.known_tokens
    if work.targets:
        assert result is not None
        logprobs, top = zip(*result.scores, strict=True)
        items.append(Scored(scored + 1, logprobs, top))
        scored += len(logprobs)
    if work.samples and sequence.request.sampling.max_tokens == 0:
        reason = "length"
    elif work.samples:
        assert result is not None
        if result.token in sequence.request.sampling.stop_tokens:
            reason = "stop"
        else:
            items.append(
                Token(
                    known,
                    result.token,
                    result.logprob,
                    batch.epoch,
                    batch.degraded,
                    result.top,
                    sequence.cached_tokens or 0,
                )
            )
            generated = (*generated[:known], result.token, *generated[known + 1 :])
            reason = limits.length_reason(sequence.request, known + 1)
    return (
        dataclasses.replace(sequence, generated=generated, scored=scored, in_flight=sequence.in_flight[1:]),
        items,
        reason,
    )
