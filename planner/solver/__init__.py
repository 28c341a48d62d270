"""The solver: mesh shapes, placement, roles, tensor and parity groups, and the lattice of prepared losses."""
