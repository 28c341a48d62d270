"""After which steps the model's layer of multi-token prediction runs (docs/decisions/0022). Pure, as all of the engine.

A pass takes a share of the step, on every rank. It is made when its guesses are worth waiting for, by the rule that
also decides how many drafts a step takes; else only in as many steps as take a small share of the time, so that the
rates of right guesses stay known.
"""

import dataclasses

from serving.engine.batch import Batch
from serving.engine.limits import Limits
from serving.engine.sequence import Sequence
from serving.engine.speculation import MODEL_CLASS, may_be_worth, worth_waiting
from serving.engine.state import EngineState


def plan_drafts(state: EngineState, batch: Batch) -> tuple[EngineState, Batch]:
    """The state with this step in flight and the step, after it is decided whether the model drafts then.

    It does if guesses of the tokens after this step are worth waiting for; or, in a step with prompts, if guesses for
    all open requests would be once they decode, since the layer needs its entries of prompts. Else it does if they
    would be worth waiting for if all were right, and a pass is saved up.
    """
    limits = state.limits
    if not limits.model_drafts:
        return state, batch
    work = {item.request_id: item for part in batch.scheduled.values() for item in part}
    here = [state.running[request_id] for request_id in work]
    soon = [each for each in here if work[each.id].samples and not each.ending]
    prompts = [each for each in here if work[each.id].tiles]
    running, passes, cost, probe = _going_on(state), state.draft_passes, limits.draft_cost, False
    worth = _worth_waiting(limits, soon, rows=running, most=_most(limits, soon), cost=cost)
    worth = worth or (any(_drafts(limits, each) for each in prompts) and _worth_after_prompts(state, prompts))
    if not worth and passes.saved >= 1:
        probe = _worth_waiting(limits, soon, rows=running, most=limits.model_drafts, cost=cost, rate=1.0)
    if worth or probe:
        return dataclasses.replace(state, draft_passes=passes.ran(probe=probe)), batch
    return (
        dataclasses.replace(state, draft_passes=passes.skipped(cost)),
        dataclasses.replace(batch, skip_drafts=True),
    )


def _worth_after_prompts(state: EngineState, prompts: list[Sequence]) -> bool:
    """Whether guesses for all open requests would be worth waiting for once they decode. `prompts` are those of which
    this step computes a part, which counts for the prefix cache also where it is the last step."""
    limits, requests = state.limits, len(state.running) + len(state.waiting)
    most, cost = limits.model_drafts, limits.draft_cost
    if limits.draft_tokens is None and not may_be_worth(
        requests, most=most, rows=requests, requests=requests, cost=cost
    ):
        return False  # most likely under load, where there are many to look at
    here = {each.id for each in prompts}
    others = (*state.running.values(), *state.waiting.values())
    later = [*prompts, *(each for each in others if each.id not in here and not each.ending)]
    return _worth_waiting(limits, later, rows=len(later), most=most, cost=cost)


def should_wait(state: EngineState, sequences: list[Sequence]) -> bool:
    """Whether the next step should wait for the model's guesses for these requests, which get a token in the step in
    flight: the model drafts after it, and they are worth the delay."""
    limits, rows = state.limits, _going_on(state)
    most = _most(limits, sequences)
    return state.draft_passes.made and _worth_waiting(limits, sequences, rows=rows, most=most, cost=0.0)


def _going_on(state: EngineState) -> int:
    """Number of requests with a rank that are not in their last step."""
    return sum(not each.ending for each in state.running.values())


def _most(limits: Limits, sequences: list[Sequence]) -> int:
    """Guesses that a step makes for each of these requests: one after a prompt."""
    return limits.model_drafts if any(each.known_tokens for each in sequences) else 1


def _worth_waiting(
    limits: Limits, sequences: list[Sequence], *, rows: int, most: int, cost: float, rate: float | None = None
) -> bool:
    """Whether a step of so many rows should wait for at most `most` guesses for each of these requests, which take
    `cost` of a step; with `rate` as if so many were right."""
    rates = [each.drafting.rates[MODEL_CLASS] if rate is None else rate for each in sequences if _drafts(limits, each)]
    return worth_waiting(rates, most=most, rows=rows, requests=rows, fixed=limits.draft_tokens, cost=cost)


def _drafts(limits: Limits, sequence: Sequence) -> bool:
    """Whether the model drafts for a request."""
    return bool(limits.model_drafts) and limits.speculates(sequence.request) and not sequence.drafting.stopped
