"""The runtime of one rank: compiled programs, executables, live weights, transfers, and process groups."""
