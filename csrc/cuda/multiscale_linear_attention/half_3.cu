// Maps of both half types and depthwise kernels of 3 x 3: their machine code is nearly the same, and packs best together.
#include "kernels.cuh"

MULTISCALE_KERNELS(bf16, 3)
MULTISCALE_KERNELS(f16, 3)
