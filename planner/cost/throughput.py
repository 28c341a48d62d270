"""Requests that fit on a shape, and its tokens per second and delays under a traffic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from planner.cost.roofline import CHUNK, StepTime, first_token_time, prefill_time, step_time
from planner.inputs.cluster import Cluster
from planner.inputs.engine import Engine, engine_of
from planner.inputs.layer_states import STATES_PER_REQUEST
from planner.inputs.traffic import Traffic
from planner.inputs.workload import Workload
from planner.plan.shape import Shape
from planner.solver.shapes import cache_pages, memory_budget, rest_bytes

EXPERT_SLOTS = "expert slots"
UNLIMITED = 256  # requests of a group when neither memory nor delay limits them


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A shape and the prediction for it; `reason` says why it is out, empty when it is feasible. Where devices are of
    several kinds, `requests_by_kind` are the requests of a group of each, and `requests_per_group` is their mean."""

    shape: Shape
    reason: str = ""
    requests_per_group: int = 0
    pages_per_rank: int = 0
    step: StepTime | None = None
    tokens_per_second: float = 0.0
    tokens_per_second_per_user: float = 0.0
    ttft_seconds: float = 0.0
    requests_by_kind: tuple[tuple[str, int], ...] = ()
    memory: tuple[tuple[str, int], ...] = ()

    def per_device(self) -> float:
        """Tokens per second and device, with standby ranks among the devices."""
        return self.tokens_per_second / len(self.shape.roles)

    def memory_by_device(self) -> dict[str, tuple[tuple[str, int], ...]]:
        """The uses of memory, (name, bytes), of each kind of device: apart, attention and experts share none."""
        if self.shape.arch == "collocated":
            return {"a device": self.memory}
        held = tuple(use for use in self.memory if use[0] == EXPERT_SLOTS)
        return {
            "an attention device": tuple(use for use in self.memory if use not in held),
            "an expert device": held,
        }

    def to_dict(self) -> dict:
        """The prediction for JSON; every number is an estimate."""
        return {
            "shape": self.shape.describe(),
            "reason": self.reason,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_per_device": self.per_device(),
            "tokens_per_second_per_user": self.tokens_per_second_per_user,
            "ttft_s": self.ttft_seconds,
            "requests_per_group": self.requests_per_group,
            **({"requests_by_kind": dict(self.requests_by_kind)} if self.requests_by_kind else {}),
            "pages_per_rank": self.pages_per_rank,
            "step_s": self.step.parts() if self.step else {},
            "memory_bytes": dict(self.memory),
            "memory_bytes_by_device": {device: dict(uses) for device, uses in self.memory_by_device().items()},
            "source": "estimate",
        }


def assess(
    workload: Workload, cluster: Cluster, shape: Shape, traffic: Traffic, *, peak: float = 1.0, work: str = "all"
) -> Candidate:
    """The prediction for `shape` with as many requests as memory and `traffic` (its `tpot_ms`, its `rps`) allow. `work`
    is the part of requests that it computes (`planner.plan.deployment.WORKS`)."""
    if work == "prompts":
        return assess_prompts(workload, cluster, shape, traffic, peak=peak)
    if missing := _short_of_memory(workload, cluster, shape):
        return Candidate(shape=shape, reason=missing)
    rest = rest_bytes(workload, shape.tensor, shape.dense)
    pages = free_pages(workload, cluster, shape)
    fits = requests_that_fit(workload, pages, traffic)
    if fits < 1:
        tokens = pages * workload.page_tokens
        reason = f"{tokens:,} cache tokens a rank hold no request of {traffic.longest:,}"
        return Candidate(shape=shape, reason=reason)
    prefill = (
        prefill_time(workload, cluster, shape, traffic.prompt, known=traffic.known, peak=peak) if work == "all" else 0.0
    )
    engine = engine_of(cluster.hardware)

    def busy_with(count: int) -> float:
        """Seconds of a group per token of each stream: a step, and the prefill of the requests that begin in it."""
        step = step_time(workload, cluster, shape, count, traffic.context, peak=peak)
        return step.total / workload.kept + count / traffic.output * prefill

    def gap_with(count: int) -> float:
        """Seconds between two tokens of a stream."""
        step = step_time(workload, cluster, shape, count, traffic.context, peak=peak)
        return token_gap(step.total / workload.kept, prefill, count, traffic.output, engine)

    requests = largest_count(fits, lambda count: gap_with(count) <= traffic.tpot_ms / 1e3)
    if requests < 1:
        reason = f"a token of a single request takes {gap_with(1) * 1e3:.0f} ms, asked {traffic.tpot_ms:g} ms"
        return Candidate(shape=shape, reason=reason)
    late = ""
    if traffic.rps is not None:
        wanted = traffic.rps * traffic.output

        def short(count: int) -> bool:
            return count * shape.data / busy_with(count) < wanted

        if short(requests):
            most = requests * shape.data / busy_with(requests) / traffic.output
            late = f"serves {most:.3g} requests/s, asked {traffic.rps:g}"
        else:
            requests = largest_count(requests - 1, short) + 1
    step = step_time(workload, cluster, shape, requests, traffic.context, peak=peak)
    busy = busy_with(requests)
    ttft = first_token_time(workload, cluster, prefill, step.total, requests - 1)
    if ttft * 1e3 > traffic.ttft_ms:
        late = f"first token after {ttft * 1e3:.0f} ms, asked {traffic.ttft_ms:g} ms"
    return Candidate(
        shape=shape,
        reason=late,
        requests_per_group=requests,
        pages_per_rank=pages,
        step=step,
        tokens_per_second=requests * shape.data / busy,
        tokens_per_second_per_user=1 / gap_with(requests),
        ttft_seconds=ttft,
        memory=(
            ("attention, shared, dense, embeddings", rest),
            (EXPERT_SLOTS, shape.slots * workload.slot_bytes),
            cache_in_use(workload, shape, traffic, requests),
        ),
    )


def _short_of_memory(workload: Workload, cluster: Cluster, shape: Shape) -> str:
    """Why the weights do not fit on a rank beside one cache page; empty when they do."""
    room, held = memory_budget(cluster), shape.slots * workload.slot_bytes
    attending = rest_bytes(workload, shape.tensor, shape.dense) + (held if shape.arch == "collocated" else 0)
    missing = 0 if room is None else max(attending, held) + workload.page_bytes - room
    return f"weights leave no room for cache: {gb(missing)} short per rank" if missing > 0 else ""


def free_pages(workload: Workload, cluster: Cluster, shape: Shape) -> int:
    """Cache pages that fit beside the weights of a rank with attention."""
    slots = shape.slots if shape.arch == "collocated" else 0
    rest = rest_bytes(workload, shape.tensor, shape.dense)
    return cache_pages(workload, cluster, slots, tensor=shape.tensor, rest=rest)


def cache_in_use(workload: Workload, shape: Shape, traffic: Traffic, requests: int) -> tuple[str, int]:
    """The use of a rank's memory, (name, bytes), by the cache of `requests` requests of its group at their longest."""
    each = traffic.longest * workload.cache_bytes_per_token + STATES_PER_REQUEST * workload.state_bytes
    return "cache in use", requests * each // min(shape.tensor, workload.cache_splits)


def assess_prompts(
    workload: Workload, cluster: Cluster, shape: Shape, traffic: Traffic, *, peak: float = 1.0
) -> Candidate:
    """The prediction for a `shape` that computes prompts alone, in steps of as many as the first token has time for.

    `tokens_per_second` are those of the answers to its prompts, `requests_per_group` the prompts of a step, and
    `ttft_seconds` ends when the cache of a prompt has been sent elsewhere.
    """
    if missing := _short_of_memory(workload, cluster, shape):
        return Candidate(shape=shape, reason=missing)
    pages = free_pages(workload, cluster, shape)
    fits = requests_that_fit(workload, pages, replace(traffic, output=1))
    if fits < 1:
        reason = f"{pages * workload.page_tokens:,} cache tokens a rank hold no prompt of {traffic.prompt:,}"
        return Candidate(shape=shape, reason=reason)
    sent = cache_transfer_seconds(workload, cluster, traffic.prompt)
    best = None
    for count in sorted({min(fits, max(1, CHUNK * times // int(traffic.prompt))) for times in (1, 2, 4)}):
        step, seconds = prompts_time(workload, cluster, shape, traffic, count, peak)
        ttft = seconds + sent
        rate = count * shape.data / seconds * traffic.output
        if ttft * 1e3 <= traffic.ttft_ms and (best is None or rate > best.tokens_per_second):
            best = Candidate(
                shape=shape,
                requests_per_group=count,
                pages_per_rank=pages,
                step=step,
                tokens_per_second=rate,
                ttft_seconds=ttft,
                memory=(
                    ("attention, shared, dense, embeddings", rest_bytes(workload, shape.tensor, shape.dense)),
                    (EXPERT_SLOTS, shape.slots * workload.slot_bytes),
                    (
                        "cache in use",
                        int(count * workload.cache_bytes(traffic.prompt)) // min(shape.tensor, workload.cache_splits),
                    ),
                ),
            )
    if best is not None:
        return best
    _, seconds = prompts_time(workload, cluster, shape, traffic, 1, peak)
    late = f"a prompt and its transfer take {(seconds + sent) * 1e3:.0f} ms, asked {traffic.ttft_ms:g} ms"
    return Candidate(shape=shape, reason=late)


def prompts_time(
    workload: Workload, cluster: Cluster, shape: Shape, traffic: Traffic, count: int, peak: float
) -> tuple[StepTime, float]:
    """The (last) step of `count` prompts of every group, and the seconds of all of its steps: prompts longer than CHUNK
    tokens take several."""
    prompt = traffic.prompt
    seconds, done, step = 0.0, traffic.known, None
    while step is None or done < prompt:
        chunk = prompt - done if count > 1 else min(CHUNK, prompt - done)
        step = step_time(
            workload,
            cluster,
            shape,
            chunk * count,
            done + chunk / 2,
            requests=count,
            in_prompt=True,
            peak=peak,
        )
        seconds, done = seconds + step.total, done + chunk
    return step, seconds


def cache_transfer_seconds(workload: Workload, cluster: Cluster, tokens: float, *, lanes: int = 1) -> float:
    """Seconds to send the KV cache of a request with `tokens` tokens to another host, over `lanes` network ports."""
    return workload.cache_bytes(tokens) / (lanes * cluster.hardware.network_bandwidth)


def token_gap(step: float, prefill: float, count: float, output: int, engine: Engine) -> float:
    """Seconds between two tokens of a stream among `count` of a group: a `step` (its share for each token that it gives
    a request), and the share of the `prefill` of the others that begin in it which falls between tokens
    (`Engine.interference`). The rest of their prefills wait for each other."""
    others = max(0.0, count - 1) if engine.mixed else count
    return step + engine.interference * others / output * prefill


def requests_that_fit(workload: Workload, pages: int, traffic: Traffic) -> int:
    """The number of requests of a group whose cache fits in `pages` at their longest."""
    if not pages:
        return UNLIMITED
    each: float = traffic.longest
    if workload.cache_bytes_per_token:
        each = workload.room_bytes(traffic.longest) / workload.cache_bytes_per_token
    return int(pages * workload.page_tokens // each)


def largest_count(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest count up to `limit` for which `fits` is true, where it is false from some count on; 0 if none is."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def gb(count: float) -> str:
    """Bytes as text in GB."""
    return f"{count / 1e9:,.1f} GB"
