"""What the CUDA C++ kernels of csrc/cuda share on the host: the driver, loading, launches."""
