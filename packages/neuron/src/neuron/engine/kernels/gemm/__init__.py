"""Triton kernels of matrix products."""
