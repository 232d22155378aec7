"""multiscale_linear_attention on Triton: which kernels run a call, with what, and the kernels."""
