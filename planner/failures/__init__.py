"""Failures: the cost of every loss, forecasts over all of them, and simulated months."""
