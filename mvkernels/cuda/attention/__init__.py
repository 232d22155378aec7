"""Softmax attention inside groups of pixels, in CUDA C++."""
