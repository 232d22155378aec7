// float16 maps and depthwise kernels of 5 x 5.
#include "kernels.cuh"

MULTISCALE_KERNELS(f16, 5)
