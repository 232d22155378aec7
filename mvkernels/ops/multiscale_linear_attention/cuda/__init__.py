"""multiscale_linear_attention's convolutions in CUDA C++."""
