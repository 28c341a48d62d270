"""The plan as a value, plan files, and the moves between two plans."""
