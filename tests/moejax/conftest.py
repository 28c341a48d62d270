"""The kernels are used wherever this machine can build them, as in a rank."""

import contextlib

from moejax import kernels

with contextlib.suppress(kernels.KernelError):
    kernels.load()
