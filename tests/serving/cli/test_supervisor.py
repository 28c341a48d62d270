"""When the next front serves, after fronts that died."""

from serving.cli.supervisor import FREE_RESTARTS, MAX_PAUSE_S, pause_before_front_s


def test_a_few_short_lived_fronts_cost_no_pause_more_cost_twice_as_much_each_up_to_a_limit() -> None:
    pauses = [pause_before_front_s(short_lived) for short_lived in range(FREE_RESTARTS + 9)]
    assert pauses[: FREE_RESTARTS + 1] == [0.0] * (FREE_RESTARTS + 1)
    assert pauses[FREE_RESTARTS + 1 :] == [1.0, 2.0, 4.0, 8.0, 16.0, MAX_PAUSE_S, MAX_PAUSE_S, MAX_PAUSE_S]
