"""Compiled kernels: for the CPU in C, for GPUs in Triton."""
