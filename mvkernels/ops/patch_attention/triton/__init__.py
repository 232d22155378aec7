"""patch_attention on Triton: how its arguments reach the kernels that it shares."""
