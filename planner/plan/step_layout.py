"""The layout of a step's rows, which planner, front and ranks have in common."""

TILE = 32
"""Rows of a tile, the part of a step that one chunk of a prompt takes."""
DROPPED = 2**30
"""Cache entry of padding rows: beyond every cache, so that XLA drops the write."""
