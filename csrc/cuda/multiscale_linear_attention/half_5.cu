// Maps of both half types and depthwise kernels of 5 x 5: their machine code is nearly the same, and packs best together.
#include "kernels.cuh"

MULTISCALE_KERNELS(bf16, 5)
MULTISCALE_KERNELS(f16, 5)
