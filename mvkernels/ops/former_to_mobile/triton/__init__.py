"""former_to_mobile on Triton: which kernels run a call, with what, and the kernels."""
