"""Triton kernels and the code that launches them, for the backends of both vendors."""
