"""Kernels in CUDA C++, for what needs shared memory at any address and its atomics, which Triton has not."""
