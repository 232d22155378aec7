// The backward's kernels: backward.cuh, for each type and each number of channels.
#include "backward.cuh"

#define BACKWARD(NAME, TYPE, PRODUCTS, PLAIN, TILES, WARPS, BLOCKS, DP)                       \
  extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)                            \
      attention_backward_##NAME##_##DP(BACKWARD_PARAMETERS(TYPE)) {                           \
    extern __shared__ __align__(16) unsigned char global_smem[];                              \
    mvk::attention::backward<PRODUCTS, DP, PLAIN, TILES, WARPS>(BACKWARD_GIVEN, global_smem); \
  }
// Sixteen warps; with masks, a bias and 64 channels a warp needs more registers than there are for so many: there are
// eight, which own 32 keys each, and so do all in float32.
#define PLAIN_BACKWARD(NAME, TYPE, DP) BACKWARD(NAME##_plain, TYPE, mvk::Halves<TYPE>, true, 1, 16, 1, DP)
#define BACKWARDS_OF_HALVES(NAME, TYPE, DP) \
  PLAIN_BACKWARD(NAME, TYPE, DP)            \
  BACKWARD(NAME, TYPE, mvk::Halves<TYPE>, false, 1, 16, 1, DP)
#define BACKWARDS_OF_FLOATS(DP)                                \
  BACKWARD(f32, float, mvk::Singles<true>, false, 2, 8, 1, DP) \
  BACKWARD(tf32, float, mvk::Singles<false>, false, 2, 8, 1, DP)
#define BACKWARDS(DP)                      \
  BACKWARDS_OF_HALVES(bf16, mvk::bf16, DP) \
  BACKWARDS_OF_HALVES(f16, mvk::f16, DP)   \
  BACKWARDS_OF_FLOATS(DP)

BACKWARDS(16)
BACKWARDS(24)
BACKWARDS(32)
BACKWARDS(40)
BACKWARDS(48)
PLAIN_BACKWARD(bf16, mvk::bf16, 64)
PLAIN_BACKWARD(f16, mvk::f16, 64)
BACKWARD(bf16, mvk::bf16, mvk::Halves<mvk::bf16>, false, 2, 8, 1, 64)
BACKWARD(f16, mvk::f16, mvk::Halves<mvk::f16>, false, 2, 8, 1, 64)
