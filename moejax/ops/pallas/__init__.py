"""Kernels for GPUs and TPUs, in Pallas, behind the same functions as their JAX references.

`moejax.model.experts` and `moejax.model.attention` choose a kernel when a program is lowered, by the platform that it
is lowered for; so the choice is the same when a program is compiled ahead of time for devices that are absent. The
reference computes the cases that a kernel does not cover (`supports_...` in its module). As in the references, the
order of a row's sums does not depend on other rows.
"""
