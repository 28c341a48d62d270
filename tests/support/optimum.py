"""The yardstick for placement: the least load the hottest rank can have, by integer programming (HiGHS)."""

from __future__ import annotations

import highspy
import numpy as np


def least_peak(load: np.ndarray, ranks: int, slots: int) -> float:
    """Hottest rank over the mean when each expert's traffic may be split over its copies in any proportion.

    Even splits, as the server makes them, cannot do better. Minimise t with x[e, r] in {0, 1} (a copy),
    f[e, r] <= load[e] x[e, r] (traffic), sum_r f = load, sum_e f <= t, sum_e x <= slots.
    """
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("time_limit", 20.0)
    solver.setOptionValue("threads", 1)
    experts = range(len(load))
    top = solver.addVariable(lb=float(load.sum()) / ranks, obj=1.0)
    copy = [[solver.addBinary() for _ in range(ranks)] for _ in experts]
    flow = [[solver.addVariable(lb=0.0, ub=float(load[e])) for _ in range(ranks)] for e in experts]
    for e in experts:
        solver.addConstr(sum(flow[e][1:], flow[e][0]) == float(load[e]))
        for r in range(ranks):
            solver.addConstr(flow[e][r] - float(load[e]) * copy[e][r] <= 0)
    for r in range(ranks):
        solver.addConstr(sum((flow[e][r] for e in experts), 0 * top) - top <= 0)
        solver.addConstr(sum((copy[e][r] for e in experts), 0 * top) <= slots)
    solver.minimize()
    bound = solver.getInfo().mip_dual_bound
    return float(bound) * ranks / float(load.sum())
