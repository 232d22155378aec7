"""Of kernels in CUDA C++: the driver, loading, launching."""
