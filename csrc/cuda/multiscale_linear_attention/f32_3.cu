// float32 maps and depthwise kernels of 3 x 3.
#include "kernels.cuh"

MULTISCALE_KERNELS(f32, 3)
