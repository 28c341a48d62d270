"""A whole server in one process under virtual time: the real front over simulated ranks, links, store, disk, clients
and operators. One seed decides everything that happens (docs/simulation.md)."""
