"""Kernels for GPUs and TPUs, in Pallas, behind the same functions as their JAX references.

`moejax.experts` and `moejax.attention` choose when a program is lowered, by the platform it is lowered for, so that the
choice is the same where programs are compiled ahead for chips that are not there. What a kernel does not cover (its
module says what) the reference computes. Every row's sums are in an order of its own, as in the references.
"""
