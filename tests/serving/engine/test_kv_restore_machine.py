"""Recoverable KV is restored under any schedule of losses, and every stream has the tokens it has alone."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serving.engine import migration
from serving.engine.kv_restore import drop_recoverable, sequences_to_restore
from serving.errors import MoejaxError
from simulation.hand_model import small_request
from tests.serving.engine.test_kv_restore import MOST_PAGES, server


class AnyLosses(RuleBasedStateMachine):
    """Submits, steps that are copied late, losses in the middle of a step and of a restoration, in any order."""

    count = 0

    @initialize(
        pages=st.lists(st.integers(4, 16), min_size=1, max_size=3),
        way=st.sampled_from(("memory", "stream")),
        piece=st.integers(1, 30),
        caching=st.booleans(),
    )
    def start(self, pages, way, piece, caching):
        self.server = server(pages, way=way, piece=piece, prefix_caching=caching)

    @property
    def open(self):
        return [*self.server.state.running, *self.server.state.waiting]

    @rule(
        length=st.one_of(st.integers(1, 12), st.integers(8, 40), st.integers(30, 90)),
        first=st.integers(0, 1),
        max_tokens=st.integers(1, 30),
        scored=st.sampled_from((None, None, None, 0)),
    )
    def submit(self, length, first, max_tokens, scored):
        self.count += 1
        prompt = tuple((first + 7 * i) % 97 for i in range(length))
        request = small_request(
            f"r{self.count}", prompt, max_tokens=max_tokens, seed=self.count, prompt_logprobs=scored
        )
        try:
            self.server.submit(request)
        except MoejaxError:
            assert request.id not in self.open

    @rule(count=st.integers(1, 6))
    def steps(self, count):
        for _ in range(count):
            self.server.step()

    @rule()
    def copies(self):
        for rank in list(self.server.uncopied):
            self.server.copy_now(rank)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data):
        self.server.cancel(data.draw(st.sampled_from(self.open)))

    @rule(data=st.data(), part=st.integers(0, 40), in_flight=st.booleans(), worth=st.integers(0, 3))
    def lose(self, data, part, in_flight, worth):
        s = self.server
        ranks = sorted(s.ranks)
        dead = data.draw(st.sets(st.sampled_from(ranks))) if ranks else set()
        batch = s.begin() if in_flight else None
        if batch is not None:
            for rank in data.draw(st.sets(st.sampled_from(ranks))):
                s.ranks[rank].commit(s.arrays(batch, rank))
        s.lose_protected(dead, part=part, worth=lambda sequence: sequence.arrival % 4 >= worth)

    @rule(rank=st.integers(0, 3), pages=st.integers(4, 16), masked=st.booleans())
    def return_of_a_rank(self, rank, pages, masked):
        alive = {rank: pool.total for rank, pool in self.server.state.pools.items()}
        fresh = [rank] if rank not in alive else []
        self.server.adopt({rank: pages, **alive}, fresh=fresh, masked=[(0, 1)] if masked else [])

    @rule()
    def distrust(self):
        self.server._move(migration.invalidate_caches(self.server.state))

    @precondition(lambda self: sequences_to_restore(self.server.state))
    @rule(data=st.data())
    def forget(self, data):
        ids = [sequence.id for sequence in sequences_to_restore(self.server.state)]
        self.server._move(drop_recoverable(self.server.state, [data.draw(st.sampled_from(ids))]))

    @invariant()
    def streams_are_what_each_request_gives_alone(self):
        if hasattr(self, "server"):
            self.server.check_streams()

    def teardown(self):
        if hasattr(self, "server"):
            alive = {rank: pool.total for rank, pool in self.server.state.pools.items()}
            self.server.adopt({**alive, 9: MOST_PAGES})
            self.server.drain()
            self.server.check_streams(all_ended=True)
            self.server.close()


TestAnyLosses = AnyLosses.TestCase
TestAnyLosses.settings = settings(
    max_examples=80, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
