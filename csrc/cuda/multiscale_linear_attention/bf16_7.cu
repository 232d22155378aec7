// bfloat16 maps and depthwise kernels of 7 x 7.
#include "kernels.cuh"

MULTISCALE_KERNELS(bf16, 7)
