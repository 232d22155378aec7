"""inverted_residual on Triton: which kernel runs a call, with what, and the kernel."""
