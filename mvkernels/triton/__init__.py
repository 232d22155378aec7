"""What the Triton kernels of the ops share. Nothing here imports Triton but the kernels themselves."""
