"""Kernels for CPUs (C++ through the FFI), GPUs and TPUs (Pallas)."""
