"""Hypothesis settings of the planner's tests: no deadline, the machine may be shared."""

from hypothesis import settings

settings.register_profile("planner", deadline=None, max_examples=30)
settings.load_profile("planner")
