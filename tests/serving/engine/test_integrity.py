"""The check of a state notices whatever is owned twice, lost, or out of order."""

import dataclasses

import pytest

from serving.engine.integrity import check_integrity
from simulation.hand_model import small_request
from tests.support.fake_engine import small_engine


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pages": (0,)}, r"lost \[1\]"),
        ({"pages": (1, 2)}, r"in two places \[2\]"),
        ({"pages": ()}, "in room for 0"),
        ({"rank": 5}, "which is not there"),
        ({"computed": 999}, "nothing to compute"),
        ({"generated": (1, 2, 3, 4)}, "still open"),
        ({"arrival": 9}, "arrived as 9 of 2"),
    ],
)
def test_broken_conservation_is_noticed(change, message):
    s = small_engine((16,))
    s.submit(small_request("a"))
    s.submit(small_request("b"))
    s.step()
    broken = dataclasses.replace(s.state.running["b"], **change)
    with pytest.raises(AssertionError, match=message):
        check_integrity(dataclasses.replace(s.state, running={**s.state.running, "b": broken}))
