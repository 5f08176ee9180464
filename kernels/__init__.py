"""Triton kernels, one file per operation, named as the operation."""
