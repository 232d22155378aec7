// bfloat16 maps and depthwise kernels of 3 x 3.
#include "kernels.cuh"

MULTISCALE_KERNELS(bf16, 3)
