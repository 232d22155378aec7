"""What the Triton kernels of both bridges share, from a map to a few tokens and back."""
