"""mobile_to_former on Triton: which kernels run a call, with what, and the kernels."""
