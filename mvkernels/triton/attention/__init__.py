"""What the Triton kernels of softmax attention inside groups of pixels share: by patches, by windows, between maps."""
