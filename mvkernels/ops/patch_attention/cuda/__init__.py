"""patch_attention in CUDA C++: how its arguments reach the kernels that it shares."""
