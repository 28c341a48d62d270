"""Laws of the step, each held for models of one kind by a file of tests: it is the model, on any number of ranks, and
no bit of a row depends on anything but the row."""

import dataclasses

import jax
import numpy as np

from moejax.config.model_config import in_slots
from serving.engine.batch import ScheduledRequest, StepBucket, layout
from serving.engine.snapshots import SnapshotWrite
from tests.support.decoder_models import BUCKET, CONFIGS, PAGES, params, prefill, stepper, tokens_of
from tests.support.reference import forward
from tests.support.stepping import PAGE, work

SLACK = 0.25
"""The error of a row's logits, relative to the largest, in the median row. These weights are random and large, so that
a little error in a key chooses other positions, and other experts; the kernels have their own bounds."""


def check_agrees(name: str, ranks: int) -> None:
    """A step agrees with the float64 reference on so many ranks."""
    tokens = tokens_of(41)
    logits = forward(params(name), CONFIGS[name], tokens)[-1]
    _, (token, logprob) = prefill(stepper(name, ranks), tokens, ranks - 1, BUCKET)
    assert token == int(np.argmax(logits))
    expected = logits[token] - np.logaddexp.reduce(logits)
    assert abs(logprob - expected) < 1e-4 * np.abs(logits).max()  # float32 over at most 7 layers


def check_narrow_is_close(name: str, form: str) -> None:
    """A step over a cache in a narrow format is close to the float64 reference."""
    tokens, model, bucket = tokens_of(41), stepper(name, 4, form), BUCKET
    logits = forward(params(name), CONFIGS[name], tokens)
    out = model.run(bucket, {0: (work(tokens, 0, PAGES),)})
    error = np.abs(model.logits(out, bucket, 0, bucket.decode, 41) - logits).max(-1) / np.abs(logits).max()
    assert 0 < np.median(error) < SLACK


def check_bits(name: str, form: str = "float32") -> None:
    """No bit depends on ranks, buckets, neighbours or on what was cached."""
    tokens, other = tokens_of(70), tokens_of(50, seed=1)
    kv, sampled = prefill(stepper(name, 1, form), tokens, 0, StepBucket(8, 4))
    for ranks in (1, 4) if name in ("mixtral", "shared") else (4,):
        model = stepper(name, ranks, form)
        rank = ranks - 1
        model.run(BUCKET, {rank: (work(tokens[:60], 0, PAGES),)})
        # Token by token from here, over the end of a page, in buckets of changing size, beside another rank's prefill.
        for at in range(60, 70):
            bucket = (StepBucket(2, 0), BUCKET)[at % 2]
            mine = (work([tokens[at]], at, PAGES),)
            crowd = {0: (work(other, 0, (0, 1)),)} if bucket.tiles and rank else {}
            out = model.run(bucket, {rank: mine, **crowd})
            np.testing.assert_array_equal(model.rows(out, bucket, rank, 0, 1)[:, 0], kv[:, at])
        assert model.segment(out, bucket, rank, 0) == sampled


def check_snapshots(name: str) -> None:
    """A request that begins from the snapshot of another one's state, which a tile of a prompt or a decode row left,
    has the bits of one that computes everything."""
    tokens, bucket, rank = tokens_of(66), BUCKET, 3
    other = {0: (work(tokens_of(50, seed=1), 0, (0, 1)),)}
    alone, model = stepper(name, 4), stepper(name, 4)
    out = alone.run(bucket, {rank: (work(tokens[:64], 0, PAGES),)})
    kv = alone.rows(out, bucket, rank, bucket.decode, 64)
    expected = [alone.run(bucket, {rank: (work([tokens[at]], at, PAGES),)}) for at in (64, 65)]
    in_prompt, in_decode = model.states - 1, model.states - 2
    first = work(tokens[:50], 0, (5, 2), states=(0, 1), snapshots=(SnapshotWrite(PAGE, in_prompt),))
    model.run(bucket, {rank: (first,), **other})
    rest = work(tokens[PAGE:63], PAGE, (5, 3, 4), states=(in_prompt, 4))
    out = model.run(bucket, {rank: (rest,), **other})
    np.testing.assert_array_equal(model.rows(out, bucket, rank, bucket.decode, 63 - PAGE), kv[:, PAGE:63])
    last = work([tokens[63]], 63, (5, 3, 4), states=(4, 5), snapshots=(SnapshotWrite(64, in_decode),))
    model.run(bucket, {rank: (last,), **other})
    for pages, own in (((5, 3, 4), 3), ((5, 3, 6), 6)):  # the same request, and another one with its prefix
        for nth, (read, write) in enumerate(((in_decode, own), (own, own + 1))):
            item = work([tokens[64 + nth]], 64 + nth, pages, states=(read, write))
            out = model.run(bucket, {rank: (item,)})
            np.testing.assert_array_equal(
                model.rows(out, bucket, rank, 0, 1), alone.rows(expected[nth], bucket, rank, 0, 1)
            )
            assert model.segment(out, bucket, rank, 0) == alone.segment(expected[nth], bucket, rank, 0)


def check_drafts(name: str) -> None:
    """Rows of drafts are those of the tokens one by one, whatever the drafts after them."""
    tokens, bucket, other = tokens_of(40), BUCKET, {0: (work(tokens_of(1, seed=5), 0, (0,)),)}
    model, drafted = stepper(name, 4), stepper(name, 4)
    for each in (model, drafted):
        each.run(bucket, {1: (work(tokens[:30], 0, PAGES),)})
    chosen = {"temperature": 0.8, "seed": 7}
    kv, sampled = [], []
    for at in range(30, 36):  # over the end of a page
        out = model.run(bucket, {1: (work([tokens[at]], at, PAGES, **chosen),), **other})
        kv.append(model.rows(out, bucket, 1, 0, 1)[:, 0])
        sampled.append(model.segment(out, bucket, 1, 0))
    for at, wrong in ((30, False), (32, True), (33, False)):
        guesses = (tokens[at + 1], 1 if wrong else tokens[at + 2])
        item = dataclasses.replace(work([tokens[at]], at, PAGES, **chosen), drafts=guesses)
        out = drafted.run(bucket, {1: (item,)})
        for nth in range(2 if wrong else 3):
            np.testing.assert_array_equal(drafted.rows(out, bucket, 1, nth, 1)[:, 0], kv[at - 30 + nth])
            assert drafted.segment(out, bucket, 1, nth) == sampled[at - 30 + nth]


def check_twice(name: str) -> None:
    """A step made twice leaves the cache as once."""
    model, tokens = stepper(name, 4), tokens_of(40)
    first = prefill(model, tokens, 1, BUCKET)
    before = jax.tree.map(np.array, model.cache)
    again = prefill(model, tokens, 1, BUCKET)
    assert first[1] == again[1]
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, model.cache))


def read_rows(bucket: StepBucket, part: tuple[ScheduledRequest, ...]) -> np.ndarray:
    """Which of a rank's rows `[R]` a token is chosen or scored after."""
    read = np.zeros(bucket.rows, bool)
    for placed in layout(bucket, part):
        scored = np.flatnonzero(np.array(placed.scheduled.targets, int) >= 0)
        read[placed.row + scored] = True
        read[placed.row + len(placed.scheduled.tokens) - 1] |= placed.scheduled.samples
    return read


def check_unread(name: str, ranks: int) -> None:
    """Rows that nobody reads end at their keys and values and change no bit."""
    bucket, generator = BUCKET, np.random.default_rng(ranks)
    targets = tuple(np.where(generator.random(40) < 0.3, generator.integers(0, 128, 40), -1).tolist())
    one = (work(tokens_of(1, seed=5), 0, (0,)), work(tokens_of(1, seed=6), 0, (1,), samples=False, targets=(7,)))
    parts = (
        (*one, work(tokens_of(40, seed=1), 0, (4, 5), samples=False, targets=targets)),
        (*one, work(tokens_of(33), 0, (2, 3))),
        (work(tokens_of(64, seed=2), 0, (6, 7), samples=False), *one),
    )
    works = dict(enumerate(parts[:ranks]))
    model = stepper(name, ranks)
    fewer, whole = model.run(bucket, works, all_read=False), model.run(bucket, works)
    read = np.concatenate([read_rows(bucket, works.get(rank, ())) for rank in range(ranks)])
    np.testing.assert_array_equal(fewer.hidden[read], whole.hidden[read])
    np.testing.assert_array_equal(fewer.hidden[~read], 0)
    jax.tree.map(np.testing.assert_array_equal, fewer.new_kv, whole.new_kv)
    for rank, items in works.items():
        for placed in layout(bucket, items):
            if placed.scheduled.samples:
                sampled = (model.segment(each, bucket, rank, placed.last) for each in (fewer, whole))
                assert next(sampled) == next(sampled)
    cfg, last = CONFIGS[name], CONFIGS[name].layer_kinds[-1]
    sent, all_sent = (each.expert_load.reshape(ranks, -1, cfg.moe.experts) for each in (fewer, whole))
    elsewhere = slice(0, -1 if in_slots(last) else None)
    np.testing.assert_array_equal(sent[:, elsewhere], all_sent[:, elsewhere])
    if in_slots(last):
        rows = read.reshape(ranks, -1).sum(1)
        np.testing.assert_array_equal(sent[:, -1].sum(1), rows * cfg.experts_of(last).experts_per_token)
