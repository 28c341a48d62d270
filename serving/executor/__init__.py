"""Talking to the ranks: step messages, the steps in flight, and the detection of failures and stragglers."""
