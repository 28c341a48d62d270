"""A step as one message for the ranks of a host, and their answers as one.

The front writes what requests compute; the host agent lays that out as the arrays of each rank's Step, and takes the
tokens out of the answers. So the front's part follows the number of hosts and requests, and the rest is done on the
hosts. By request `words` has `start`, the counts of tokens, pages, drafts and targets, whether it samples, `top_k`,
`seed`, and the states that it reads and writes (-1 for none), then these tokens, pages, drafts and targets; `numbers`
has `temperature`, `top_p` and `min_p`. `words` are int32 (a seed of 2**31 and more is negative), `numbers` float32.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from serving.engine.batch import Batch, ScheduledRequest, StepBucket, StepResult, layout
from serving.engine.limits import Limits
from serving.engine.logits import MaskFunction
from serving.engine.snapshots import SnapshotWrite
from serving.executor.step_messages import add_adjustments, rank_step, step_results
from serving.proto.moejax.v1 import link_pb2
from serving.protocol.sampling import ResolvedSampling

HEAD, NUMBERS = 10, 3
"""Words of a request before its tokens, and its numbers."""


@dataclasses.dataclass(frozen=True)
class HostAnswer:
    """The answers of a host's ranks, in this order, to a step."""

    ranks: Sequence[int]
    done: link_pb2.HostStepDone


@dataclasses.dataclass(frozen=True)
class StepAnswers:
    """The answers of all ranks to a step: of ranks with streams of their own, and of hosts."""

    ranks: Mapping[int, link_pb2.StepDone]
    hosts: tuple[HostAnswer, ...] = ()


def host_step(
    batch: Batch,
    ranks: Iterable[int],
    *,
    epoch: int,
    bucket: int,
    limits: Limits,
    masks: MaskFunction,
    before: Batch | None = None,
    full: Mapping[int, link_pb2.FullPages] | None = None,
) -> link_pb2.HostStep:
    """The message of a step to the ranks of one host. `bucket` is the index of its bucket, `before` the step in flight,
    if any, and `full` the pages that each rank has to know now."""
    words: list[int] = []
    numbers: list[float] = []
    names: list[str] = []
    counts: list[int] = []
    message = link_pb2.HostStep(
        epoch=epoch,
        step=batch.step,
        bucket=bucket,
        after=0 if before is None else before.step,
        decode=batch.bucket.decode,
        tiles=batch.bucket.tiles,
        page_size=limits.page_size,
        max_pages=limits.max_pages,
        skip_drafts=batch.skip_drafts,
    )
    for index, rank in enumerate(ranks):
        work = batch.scheduled.get(rank, ())
        counts.append(len(work))
        special = False
        for item in work:
            names.append(item.request_id)
            _write(item, words, numbers)
            special = special or item.logits_params is not None or bool(item.targets)
        pages = full.get(rank) if full else None
        taken = [(at, position, place) for at, item in enumerate(work) for position, place, _ in item.snapshots]
        if special or pages is not None or taken:
            extras = message.extras.add(index=index, snapshots=np.array(taken, np.int32).tobytes())
            if special:
                add_adjustments(extras, batch, rank, masks)
            if pages is not None:
                extras.full.CopyFrom(pages)
    message.counts = np.array(counts, np.int32).tobytes()
    message.requests.extend(names)
    message.words = np.array(words, np.int64).astype(np.int32).tobytes()
    message.numbers = np.array(numbers, np.float32).tobytes()
    return message


def _write(item: ScheduledRequest, words: list[int], numbers: list[float]) -> None:
    sampling, tokens, pages = item.sampling, item.tokens, item.pages
    read, write = item.states or (-1, -1)
    drafts, targets = item.drafts, item.targets
    words += (
        item.start,
        len(tokens),
        len(pages),
        len(drafts),
        len(targets),
        item.samples,
        sampling.top_k,
        sampling.seed & 0xFFFFFFFF,
        read,
        write,
        *tokens,
        *pages,
        *drafts,
        *targets,
    )
    numbers += (sampling.temperature, sampling.top_p, sampling.min_p)


def read_host_step(message: link_pb2.HostStep, links: Sequence[int]) -> Batch:
    """The step of such a message, with links in the place of ranks, and of requests what their rank computes."""
    words, numbers = np.frombuffer(message.words, np.int32).tolist(), np.frombuffer(message.numbers, np.float32)
    requests = _read(words, numbers.reshape(-1, NUMBERS).tolist(), message.requests)
    counts = np.frombuffer(message.counts, np.int32).tolist()
    scheduled = {link: tuple(next(requests) for _ in range(n)) for link, n in zip(links, counts, strict=True)}
    for extras in message.extras:
        if extras.snapshots:
            link = links[extras.index]
            scheduled[link] = _with_snapshots(scheduled[link], extras.snapshots)
    bucket = StepBucket(message.decode, message.tiles)
    scheduled = {link: work for link, work in scheduled.items() if work}
    return Batch(message.step, message.epoch, bucket, scheduled, skip_drafts=message.skip_drafts)


def _read(words: list[int], numbers: list[list[float]], names: Iterable[str]) -> Iterator[ScheduledRequest]:
    at = 0
    for name, (temperature, top_p, min_p) in zip(names, numbers, strict=True):
        start, tokens, pages, drafts, targets, samples, top_k, seed, read, write = words[at : at + HEAD]
        parts, at = [], at + HEAD
        for count in (tokens, pages, drafts, targets):
            parts.append(tuple(words[at : at + count]))
            at += count
        sampling = ResolvedSampling(
            max_tokens=1, seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
        )
        yield ScheduledRequest(
            request_id=name,
            start=start,
            tokens=parts[0],
            pages=parts[1],
            samples=bool(samples),
            sampling=sampling,
            targets=parts[3],
            drafts=parts[2],
            states=None if read < 0 else (read, write),
        )


def _with_snapshots(work: tuple[ScheduledRequest, ...], given: bytes) -> tuple[ScheduledRequest, ...]:
    """A rank's work with the snapshots that it takes."""
    taken: dict[int, list[SnapshotWrite]] = {}
    for at, position, place in np.frombuffer(given, np.int32).reshape(-1, 3).tolist():
        taken.setdefault(at, []).append(SnapshotWrite(position, place))
    return tuple(
        dataclasses.replace(item, snapshots=tuple(taken[at])) if at in taken else item for at, item in enumerate(work)
    )


def steps_of_ranks(
    message: link_pb2.HostStep, batch: Batch, links: Sequence[int], before: Batch | None
) -> Iterator[link_pb2.Step]:
    """The Step of each link. `batch` is that of the message, `before` the one of step `message.after`."""
    extras = {each.index: each for each in message.extras}
    for index, link in enumerate(links):
        step = rank_step(
            batch,
            link,
            epoch=message.epoch,
            bucket=message.bucket,
            page_size=message.page_size,
            max_pages=message.max_pages,
            before=before,
        )
        if (more := extras.get(index)) is not None:
            step.adjustments.extend(more.adjustments)
            step.targets.extend(more.targets)
            if more.HasField("full"):
                step.full.CopyFrom(more.full)
        yield step


def host_step_done(batch: Batch, answers: Mapping[int, link_pb2.StepDone]) -> link_pb2.HostStepDone:
    """The answers of these links to a step as one message, without the counts of their routers."""
    done = link_pb2.HostStepDone(epoch=batch.epoch, step=batch.step, links=answers)
    tokens: list[int] = []
    logprobs: list[float] = []
    times: list[float] = []
    for index, (link, answer) in enumerate(answers.items()):
        times += (answer.program_ms, answer.total_ms, answer.own_ms)
        done.compiles.append(answer.compiles)
        work = batch.scheduled.get(link, ())
        if answer.HasField("likeliest") or answer.scores or answer.drafts or any(item.drafts for item in work):
            done.detailed.append(index)
            detail = done.details.add()
            detail.CopyFrom(answer)
            detail.ClearField("expert_load")
        elif work:
            chosen, values = np.frombuffer(answer.tokens, np.int32), np.frombuffer(answer.logprobs, np.float32)
            at = [placed.last for placed in layout(batch.bucket, work) if placed.scheduled.samples]
            tokens += chosen[at].tolist()
            logprobs += values[at].tolist()
    done.tokens = np.array(tokens, np.int32).tobytes()
    done.logprobs = np.array(logprobs, np.float32).tobytes()
    done.times = np.array(times, np.float32).tobytes()
    return done


def host_results(batch: Batch, answer: HostAnswer) -> dict[str, StepResult]:
    """The results of a host's answer, by request."""
    done = answer.done
    results: dict[str, StepResult] = {}
    tokens = iter(np.frombuffer(done.tokens, np.int32).tolist())
    logprobs = iter(np.frombuffer(done.logprobs, np.float32).tolist())
    details = dict(zip(done.detailed, done.details, strict=True))
    for index, rank in enumerate(answer.ranks):
        if details and index in details:
            results |= step_results(batch, rank, details[index])
            continue
        for item in batch.scheduled.get(rank, ()):
            if item.samples:
                results[item.request_id] = StepResult(next(tokens), next(logprobs))
    return results
