"""A state is a value; through submits, cancels, deadlines, steps, losses and returns in any order streams are right."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serving.engine.step_results import can_look_ahead
from serving.errors import MoejaxError
from serving.protocol.sampling import StructuredOutputs
from simulation.hand_model import small_limits, small_request
from tests.support.fake_engine import CONTEXT, FakeEngine, small_engine


def test_a_state_is_never_changed_by_a_transition():
    s = small_engine((4, 6))
    for name in "abc":
        s.submit(small_request(name, range(10), max_tokens=12))
    s.step()
    seen = []
    for _ in range(12):
        seen.append((s.state, repr(s.state)))
        s.step()
    seen.append((s.state, repr(s.state)))
    s.lose([0])
    assert all(repr(state) == text for state, text in seen)


SHAPED = st.fixed_dictionaries(
    {},
    optional={
        "min_tokens": st.integers(0, 9),
        "frequency_penalty": st.sampled_from((-1.5, 0.5, 2.0)),
        "presence_penalty": st.sampled_from((-2.0, 1.0)),
        "repetition_penalty": st.sampled_from((0.5, 1.5)),
        "logit_bias": st.just(((3, 40.0), (4, -100.0))),
        "top_logprobs": st.integers(0, 1),
        "prompt_logprobs": st.integers(0, 1),
        "structured_outputs": st.just(StructuredOutputs("regex", "any")),
        "speculate": st.booleans(),
    },
)
"""Fields that bend the choice of tokens, or ask for more than tokens."""


class AnySchedule(RuleBasedStateMachine):
    """Submits, cancels, deadlines, steps, losses and returns in any order."""

    count = 0
    now = 0.0

    @initialize(
        pages=st.lists(st.one_of(st.integers(3, 6), st.integers(4, 16)), min_size=1, max_size=4),
        speculate=st.booleans(),
        draft_tokens=st.sampled_from((None, 1, 3)),
    )
    def start(self, pages, speculate, draft_tokens):
        limits = small_limits(speculate=speculate, draft_tokens=draft_tokens)
        self.server = FakeEngine.start(limits, dict(enumerate(pages)))

    @property
    def open(self):
        return [*self.server.state.running, *self.server.state.waiting]

    @rule(
        length=st.one_of(st.integers(1, 12), st.integers(8, 30), st.integers(13, CONTEXT + 1)),
        first=st.one_of(st.integers(0, 1), st.integers(0, 96)),
        max_tokens=st.one_of(st.integers(1, 12), st.just(30)),
        seed=st.integers(0, 2**40),
        stop=st.one_of(st.just(frozenset()), st.frozensets(st.integers(0, 96), max_size=4)),
        patience=st.one_of(st.none(), st.none(), st.integers(1, 3)),
        extras=st.one_of(st.just({}), SHAPED, st.just({"prompt_logprobs": 1})),
    )
    def submit(self, length, first, max_tokens, seed, stop, patience, extras):
        self.count += 1
        prompt = tuple((first + 7 * i) % 97 for i in range(length))
        deadline = None if patience is None else self.now + patience
        request = small_request(
            f"r{self.count}",
            prompt,
            max_tokens=max_tokens,
            seed=seed,
            stop_tokens=stop,
            deadline=deadline,
            **extras,
        )
        try:
            self.server.submit(request)
        except MoejaxError:
            assert request.id not in self.open

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data):
        self.server.cancel(data.draw(st.sampled_from(self.open)))

    @rule()
    def pass_time(self):
        self.now += 1
        self.server.expire(self.now)

    @rule(count=st.integers(1, 12), serial_prefill=st.booleans())
    def steps(self, count, serial_prefill):
        self.server.serial_prefill = serial_prefill
        for _ in range(count):
            self.server.step()

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def step_during_which_a_request_is_cancelled(self, data):
        batch = self.server.begin()
        self.server.cancel(data.draw(st.sampled_from(self.open)))
        if batch is not None:
            self.server.end(batch)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), count=st.integers(1, 12))
    def steps_that_are_made_before_the_last_is_in(self, data, count):
        batches = []
        for _ in range(count):
            if len(batches) < 2 and (not batches or can_look_ahead(self.server.state)):
                batch = self.server.begin()
                batches += [batch] if batch is not None else []
            if self.open and data.draw(st.booleans()):
                self.server.cancel(data.draw(st.sampled_from(self.open)))
            if batches and (len(batches) == 2 or data.draw(st.booleans())):
                self.server.end(batches.pop(0))
        for batch in batches:
            self.server.end(batch)

    @rule(data=st.data(), in_flight=st.integers(0, 2), replanned=st.booleans())
    def lose(self, data, in_flight, replanned):
        """With up to two steps in flight, of which any rank may have made the first, or both."""
        ranks = sorted(self.server.ranks)
        dead = data.draw(st.sets(st.sampled_from(ranks))) if ranks else set()
        did = set(ranks)
        for _ in range(in_flight):
            batch = self.server.begin() if can_look_ahead(self.server.state) else None
            if batch is None:
                break
            did = data.draw(st.sets(st.sampled_from(sorted(did)))) if did else set()
            for rank in did:
                self.server.run(batch, rank)
        self.server.lose(dead)
        if replanned:
            self.server.adopt({rank: pool.total for rank, pool in self.server.state.pools.items()})

    @rule(rank=st.integers(0, 4), pages=st.integers(4, 16), fresh=st.booleans(), masked=st.booleans())
    def return_of_a_rank(self, rank, pages, fresh, masked):
        alive = {rank: pool.total for rank, pool in self.server.state.pools.items()}
        self.server.adopt({**alive, rank: pages}, fresh=[rank] if fresh else [], masked=[(0, 1)] if masked else [])

    @invariant()
    def streams_are_what_each_request_gives_alone(self):
        if hasattr(self, "server"):
            self.server.check_streams()

    def teardown(self):
        if hasattr(self, "server"):
            alive = {rank: pool.total for rank, pool in self.server.state.pools.items()}
            self.server.adopt({**alive, 9: 16})
            self.server.drain()
            self.server.check_streams(all_ended=True)


TestAnySchedule = AnySchedule.TestCase
TestAnySchedule.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
