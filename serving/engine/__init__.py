"""The engine: which requests run next, and the state of each request. Pure functions of values, without a clock."""
