"""The layer with its attention in CUDA C++."""
