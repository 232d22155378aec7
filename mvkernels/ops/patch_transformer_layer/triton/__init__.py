"""patch_transformer_layer on Triton: which kernels run a call, with what, and the kernels."""
