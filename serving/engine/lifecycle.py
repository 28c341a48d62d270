"""Transitions of a single request: accepted, resumed by a later front, cancelled, expired."""

import collections
import dataclasses

from serving.engine.sequence import Sequence
from serving.engine.state import EngineState, Output, remove_requests
from serving.errors import InvalidRequest, MoejaxError, PromptTooLong, QueueFull
from serving.protocol.request import Finished, FinishReason, Request

QUEUE_RETRY_S = 1.0
"""`retry_after_s` of QueueFull before the queue time is measured."""


def submit(state: EngineState, request: Request, *, retry_after_s: float = QUEUE_RETRY_S) -> EngineState:
    """Accept a request into the queue. A named owner may have no more waiting requests than the queue has free
    places, so that some are left for others.

    Raises PromptTooLong, InvalidRequest (empty prompt, max_tokens below 1, id in use, more pages than a rank has,
    drafts for a model whose layers have a state) and QueueFull, which carries `retry_after_s`.
    """
    if state.limits.states and request.sampling.speculate:
        raise InvalidRequest(
            "speculate is true, and this model has layers whose context is a state, which cannot take a wrong draft "
            "back. Leave speculate out.",
            param="speculate",
        )
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
    waiting = {**state.waiting, request.id: Sequence(request, state.arrivals, drafting=state.first_drafting)}
    shares = state.counters.on_arrival(request.owner, owners)
    return dataclasses.replace(state, waiting=waiting, arrivals=state.arrivals + 1, counters=shares)


def resubmit(
    state: EngineState, request: Request, *, generated: tuple[int, ...], scored: int, cached_tokens: int | None
) -> tuple[EngineState, tuple[Output, ...]]:
    """Continue a request that an earlier front accepted, given the tokens and scores its client has. It ends at once
    when it is complete, or when no rank can hold it."""
    reason = state.limits.length_reason(request, len(generated)) if generated else None
    if reason is not None:
        return state, ((request.id, Finished(reason, cached_tokens or 0)),)
    try:
        _check_request(state, request)
    except MoejaxError as error:
        return state, ((request.id, error),)
    sequence = Sequence(request, state.arrivals, generated, cached_tokens, scored, drafting=state.first_drafting)
    owners = collections.Counter(other.request.owner for other in state.waiting.values())
    shares = state.counters.on_arrival(request.owner, owners)
    waiting = {**state.waiting, request.id: sequence}
    return dataclasses.replace(state, waiting=waiting, arrivals=state.arrivals + 1, counters=shares), ()


def cancel(
    state: EngineState, request_id: str, reason: FinishReason = "cancelled"
) -> tuple[EngineState, tuple[Output, ...]]:
    """End a request for a reason that the front found: the client left, or a stop string matched. An unknown id
    changes nothing."""
    if state.find(request_id) is None:
        return state, ()
    return remove_requests(state, [request_id]), ((request_id, Finished(reason)),)


def expire(state: EngineState, now: float) -> tuple[EngineState, tuple[Output, ...]]:
    """End the requests whose deadline is not after `now`."""
    late = [
        sequence.id
        for sequence in (*state.running.values(), *state.waiting.values())
        if sequence.request.deadline is not None and sequence.request.deadline <= now
    ]
    if not late:
        return state, ()
    return remove_requests(state, late), tuple((request_id, Finished("deadline")) for request_id in late)


def _check_request(state: EngineState, request: Request) -> None:
    limits, length = state.limits, len(request.prompt)
    if length == 0:
        raise InvalidRequest("the prompt has no tokens. Send at least 1.", param="prompt")
    scored_only = request.sampling.max_tokens == 0 and request.sampling.prompt_logprobs is not None
    if length >= limits.max_context + scored_only:
        raise PromptTooLong(
            f"the prompt has {length} tokens and the context holds {limits.max_context}, one of them for the "
            f"answer. Shorten the prompt to {limits.max_context - 1}.",
            param="prompt",
        )
    if request.sampling.max_tokens < 1 and not scored_only:
        raise InvalidRequest(f"max_tokens is {request.sampling.max_tokens}. Ask for at least 1.", param="max_tokens")
    if state.find(request.id) is not None:
        raise InvalidRequest(f"request id {request.id!r} is in use. Choose another.", param="request_id")
    need = limits.pages_needed(request)
    most = max((pool.total for pool in state.pools.values()), default=need)
    if need > most:
        raise InvalidRequest(
            f"{length} prompt tokens and max_tokens {request.sampling.max_tokens} need {need} pages of "
            f"{limits.page_size} tokens; a rank has {most}. Lower max_tokens or raise pages_per_rank.",
            param="max_tokens",
        )
