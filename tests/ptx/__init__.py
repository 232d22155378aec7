"""Executes on a CPU the PTX that Triton compiles the kernels to, and looks for faults while it does."""
