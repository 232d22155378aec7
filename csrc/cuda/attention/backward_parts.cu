// The backward's kernels for groups of 256 tokens without a bias: backward_parts.cuh, for each type and the heads of
// MobileViT. Their shared memory is what a block has from sm_90 on.
#include "backward_parts.cuh"

#define PARTS(NAME, TYPE, DP)                                                 \
  extern "C" __global__ void __launch_bounds__(512, 1)                        \
      attention_backward_##NAME##_plain_256_##DP(BACKWARD_PARAMETERS(TYPE)) { \
    extern __shared__ __align__(16) unsigned char global_smem[];              \
    const mvk::attention::Backward<TYPE> given = BACKWARD_GIVEN;              \
    mvk::attention::Parts<mvk::Halves<TYPE>, DP>(given, global_smem).run();   \
  }

PARTS(bf16, mvk::bf16, 16)
PARTS(bf16, mvk::bf16, 24)
PARTS(bf16, mvk::bf16, 40)
PARTS(f16, mvk::f16, 16)
PARTS(f16, mvk::f16, 24)
PARTS(f16, mvk::f16, 40)
