"""A plan that was solved before is the plan that the planner would solve again."""

import dataclasses

import pytest

from planner.errors import NoFeasiblePlan
from planner.inputs.cluster import Cluster
from planner.solver.problem import Problem
from planner.solver.solve import solve
from simulation.hand_model import PREPARED
from simulation.solved_plans import solve_once

PROBLEM = Problem(workload=PREPARED.workload(8), cluster=Cluster.local(3, hosts=["a", "a", "b"]), pages_per_rank=16)


def test_it_is_the_plan_of_the_planner_for_each_problem() -> None:
    base = solve(PROBLEM)
    for problem in (PROBLEM, PROBLEM.after_loss(base, [0, 2]), PROBLEM.after_loss(base, [1]), PROBLEM):
        assert solve_once(problem) == solve(problem)
        assert solve_once(problem) is solve_once(problem)


def test_a_problem_without_a_plan_is_refused_each_time() -> None:
    hopeless = dataclasses.replace(PROBLEM, slots_per_rank=1, survive_ranks=0)
    with pytest.raises(NoFeasiblePlan) as first:
        solve(hopeless)
    for _ in range(2):
        with pytest.raises(NoFeasiblePlan) as again:
            solve_once(hopeless)
        assert str(again.value) == str(first.value)
