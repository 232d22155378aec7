// float32 maps and depthwise kernels of 7 x 7.
#include "kernels.cuh"

MULTISCALE_KERNELS(f32, 7)
