import collections

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.plan.step_layout import TILE
from serving.engine.batch import Batch, StepBucket
from serving.engine.scheduler import DECODE_ROWS_PER_TILE, schedule
from serving.engine.state import EngineState
from simulation.hand_model import small_limits, small_request
from tests.support.fake_engine import FakeEngine


def server(pages=(16, 16), **changes) -> FakeEngine:
    return FakeEngine.start(small_limits(**changes), dict(enumerate(pages)))


def counts(batch: Batch) -> dict[str, int]:
    """{request id: tokens of this step}."""
    return {item.request_id: len(item.tokens) for part in batch.scheduled.values() for item in part}


def ranks(state: EngineState) -> dict[str, int | None]:
    return {name: sequence.rank for name, sequence in sorted(state.running.items())}


def test_nothing_to_do_is_no_step():
    s = server()
    assert schedule(s.state) == (s.state, None)


def test_a_prompt_is_taken_in_chunks_of_whole_tiles_and_its_last_chunk_samples():
    s = server()
    s.submit(small_request("a", range(90)))
    chunks = [s.step().scheduled[0][0] for _ in range(3)]
    assert [(c.start, len(c.tokens), c.samples) for c in chunks] == [
        (0, 64, False),
        (64, 26, True),
        (90, 1, True),
    ]


def test_several_prompts_share_a_step():
    s = server((16,), buckets=((4, 4),))
    for name in "abc":
        s.submit(small_request(name, range(33)))
    assert counts(s.step()) == {"a": 33, "b": 33}
    assert counts(s.step()) == {"a": 1, "b": 1, "c": 32}
    assert counts(s.step()) == {"a": 1, "b": 1, "c": 1}


@given(st.lists(st.integers(2, 128), min_size=1, max_size=8), st.integers(0, 3))
def test_prompts_in_turn_end_in_the_order_they_came_each_in_the_bucket_of_the_first(lengths, decoding):
    s = server((200,), buckets=((4, 0), (4, 2), (16, 4)), prefix_caching=False, max_context=200)
    for number in range(decoding):
        s.submit(small_request(f"d{number}", (5,), max_tokens=50))
        s.step()
    s.serial_prefill = True
    names = [f"p{number}" for number in range(len(lengths))]
    for name, length in zip(names, lengths, strict=True):
        s.submit(small_request(name, range(length), max_tokens=50))
    begun: list[str] = []
    while len(begun) < len(names):
        waiting = names[len(begun) :]
        computed = sequence.computed if (sequence := s.state.running.get(waiting[0])) else 0
        tiles = -(-(lengths[len(begun)] - computed) // TILE)
        batch = s.step()
        assert batch is not None
        rows = sum(not item.tiles for item in batch.scheduled[0])
        if rows < len(waiting):
            assert batch.bucket.tiles == (2 if rows <= 4 and tiles <= 2 else 4)
        begun += [name for name in waiting if s.heard[name]]
    assert begun == names
    s.finish()


def test_a_prompt_of_one_token_needs_no_tile():
    s = server()
    s.submit(small_request("a", (5,)))
    assert s.step().bucket == StepBucket(2, 0)


def test_the_more_decode_the_more_tiles_run_beside_them():
    tiles = {}
    for decoding in (8, 16, 24):
        s = server((400,), buckets=((32, 8),), prefix_caching=False, max_context=200, max_queue=40)
        for number in range(decoding):
            s.submit(small_request(f"d{number}", (5,), max_tokens=50))
        s.step()
        s.submit(small_request("p", range(190), max_tokens=1))
        tiles[decoding] = counts(s.step())["p"] // TILE
    assert tiles == {8: 2, 16: 4, 24: 190 // TILE}


def test_while_any_rank_decodes_prefill_gets_few_tiles_on_every_rank():
    s = server()
    s.submit(small_request("a", (5,), max_tokens=9))
    s.step()
    s.submit(small_request("b", range(80)))
    batch = s.step()
    assert counts(batch) == {"a": 1, "b": TILE}
    assert batch.bucket == StepBucket(2, 1)
    s.cancel("a")
    assert counts(s.step()) == {"b": 48}


def test_a_rank_without_work_takes_part_in_the_step():
    s = server((16, 16, 16))
    s.submit(small_request("a"))
    batch = s.step()
    assert {rank: len(part) for rank, part in batch.scheduled.items()} == {0: 1, 1: 0, 2: 0}


def test_steps_are_numbered_and_bear_their_epoch():
    s = server()
    s.submit(small_request("a"))
    first = s.step()
    s.adopt({0: 16, 1: 16})
    second = s.step()
    assert [(b.step, b.epoch) for b in (first, second)] == [(1, 0), (2, 1)]


def test_new_requests_go_to_the_rank_with_the_fewest_sequences_then_the_most_free_pages():
    s = server((10, 16, 12))
    for name in "abcd":
        s.submit(small_request(name, range(9)))
    s.step()
    assert ranks(s.state) == {"a": 1, "b": 2, "c": 0, "d": 1}


def test_a_request_goes_to_the_rank_that_has_its_prefix_unless_that_one_is_much_busier():
    s = server((16, 16), buckets=((8, 2),))
    s.submit(small_request("a", range(40), max_tokens=1))
    s.drain()
    for number in range(6):
        s.submit(small_request(f"r{number}", range(33), max_tokens=9))
        s.step()
    assert ranks(s.state) == {"r0": 0, "r1": 0, "r2": 0, "r3": 1, "r4": 1, "r5": 1}


def test_room_is_counted_without_the_pages_that_are_shared():
    s = server((8,))
    s.submit(small_request("a", range(40), max_tokens=9))
    s.step()
    s.submit(small_request("b", range(40), max_tokens=9))
    s.step()
    assert len(s.state.running) == 2
    s.submit(small_request("c", range(50, 58), max_tokens=9))
    s.step()
    assert list(s.state.waiting) == ["c"]
    s.finish()


def test_a_rank_too_small_for_a_request_is_never_its_place():
    s = server((4, 12))
    for name in "ab":
        s.submit(small_request(name, range(20), max_tokens=20))
    s.step()
    assert ranks(s.state) == {"a": 1, "b": 1}
    s.finish()


def test_a_rank_runs_no_more_sequences_than_it_has_rows():
    s = server((16,))
    for number in range(6):
        s.submit(small_request(f"r{number}"))
    s.step()
    assert (len(s.state.running), len(s.state.waiting)) == (4, 2)


def test_a_prompt_is_admitted_only_with_a_page_to_go_on():
    s = server((4,))
    s.submit(small_request("a", range(8), max_tokens=2))
    s.step()
    s.submit(small_request("b", range(8, 24), max_tokens=9))
    s.step()
    assert list(s.state.waiting) == ["b"]


def test_a_request_that_fills_a_rank_to_its_last_page_is_admitted():
    s = server((5,))
    s.submit(small_request("a", range(40), max_tokens=1))
    s.finish()


def test_a_large_request_at_the_head_of_the_queue_is_not_overtaken():
    s = server((6,))
    s.submit(small_request("a", range(16), max_tokens=20))
    s.step()
    s.submit(small_request("large", range(40), max_tokens=8))
    s.submit(small_request("small", (1,)))
    s.step()
    assert list(s.state.waiting) == ["large", "small"]


def test_the_youngest_is_preempted_and_its_place_in_the_queue_is_the_first():
    s = server((4,))
    s.submit(small_request("old", range(9), max_tokens=16))
    s.submit(small_request("young", range(8), max_tokens=16))
    while not s.state.preemptions:
        s.step()
    s.submit(small_request("new"))
    assert list(s.state.running) == ["old"]
    assert list(s.state.waiting) == ["young", "new"]
    assert s.tokens("young") == list(s.state.waiting["young"].generated) != []
    s.finish()


def test_the_first_step_after_a_loss_is_the_survivors_alone():
    s = server((16, 16))
    for name in "abcd":
        s.submit(small_request(name, range(9), max_tokens=20))
    for _ in range(3):
        s.step()
    survivors = {name for name, rank in ranks(s.state).items() if rank == 0}
    s.lose([1])
    s.adopt({0: 16})
    assert counts(s.step()) == dict.fromkeys(survivors, 1)
    after = counts(s.step())
    assert set(after) > survivors
    s.finish()


def test_without_survivors_decoding_recovery_starts_at_once():
    s = server((16, 16))
    s.submit(small_request("a", range(9)))
    s.step()
    s.lose([0])
    assert counts(s.step()) == {"a": 10}


def test_a_return_of_a_rank_delays_no_prefill():
    s = server((16,))
    s.submit(small_request("a", (5,), max_tokens=9))
    s.step()
    s.submit(small_request("b", range(9)))
    s.adopt({0: 16, 1: 16})
    assert counts(s.step()) == {"a": 1, "b": 9}


def test_a_recovered_stream_goes_before_an_older_prompt_that_has_not_streamed():
    s = server((24, 24), buckets=((2, 1),))
    s.submit(small_request("long", range(80)))
    s.submit(small_request("moved", range(9, 18)))
    assert counts(s.step()) == {"long": 32, "moved": 9}
    s.lose([1])
    assert counts(s.step()) == {"moved": 10}


def test_prefill_is_in_order_of_arrival_whatever_the_order_of_admission():
    s = server((24, 24), buckets=((2, 1),))
    s.submit(small_request("a", range(70)))
    s.submit(small_request("b", range(70)))
    assert counts(s.step()) == {"a": 32, "b": 32}
    s.lose([0])
    assert counts(s.step()) == {"a": 32}


requests = st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(0, 96))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(requests, min_size=4, max_size=11), st.lists(st.integers(3, 8), min_size=1, max_size=3), st.booleans())
def test_under_pressure_for_pages_everyone_is_served_and_nobody_starves(load, pages, serial_prefill):
    s = server((8, *pages))
    s.serial_prefill = serial_prefill
    for number, (length, max_tokens, first) in enumerate(load):
        prompt = [(first + 5 * i) % 97 for i in range(length)]
        s.submit(small_request(f"r{number}", prompt, max_tokens=max_tokens, seed=number))
    while s.state.running or s.state.waiting:
        before = s.state
        batch = s.step()
        check_step(before, batch, s)
    s.check_streams(all_ended=True)


def check_step(before: EngineState, batch: Batch, s: FakeEngine) -> None:
    """One piece of work per request and a row for each that goes on decoding, in the smallest bucket that
    covers it; the oldest is never set back."""
    seen = collections.Counter(item.request_id for part in batch.scheduled.values() for item in part)
    assert set(seen.values()) == {1}
    rows = max(sum(not item.tiles for item in part) for part in batch.scheduled.values())
    tiles = max(sum(item.tiles for item in part) for part in batch.scheduled.values())
    limits = before.limits
    covers = [b for b in limits.buckets if b.decode >= rows and b.tiles >= tiles]
    assert batch.bucket.rows == min(b.rows for b in covers)
    assert batch.bucket in covers
    decoding = sum(not item.tiles for part in batch.scheduled.values() for item in part)
    behind = len(before.running) + len(before.waiting) - decoding
    beside = max(limits.tiles_while_decoding, rows // DECODE_ROWS_PER_TILE)
    assert tiles <= (beside if decoding >= max(behind, 1) else limits.max_tiles)
    for sequence in before.running.values():
        now = s.state.find(sequence.id)
        if sequence.pending == 1 and now is not None and now.rank == sequence.rank:
            assert seen[sequence.id] == 1
    oldest = min(before.running.values(), key=lambda sequence: sequence.arrival, default=None)
    if oldest is not None and s.state.find(oldest.id) is not None:
        assert oldest.id in s.state.running
