// The forward's kernels for groups of 49 to 64 tokens: small.cuh, for each type.
#include "small.cuh"
#include "walk_call.cuh"

#define FORWARD(NAME, TYPE, COLUMNS, BIASED, BLOCKS, DP)                                                       \
  extern "C" __global__ void __launch_bounds__(128, BLOCKS) attention_forward_small_##NAME##_##DP(             \
      WALK_POINTERS(TYPE), int64_t bh, WALK_STRIDES, int bm, int bn, WALK_GROUPS, float scale, float scale2) { \
    extern __shared__ __align__(16) unsigned char global_smem[];                                               \
    mvk::attention::forward_small<mvk::Halves<TYPE>, DP, COLUMNS, BIASED>(                                     \
        {WALK_GIVEN, {bias, bh, bm, bn}, scale, scale2}, global_smem);                                         \
  }
#define FORWARDS(DP)                              \
  FORWARD(bf16_plain, mvk::bf16, 8, false, 4, DP) \
  FORWARD(f16_plain, mvk::f16, 8, false, 4, DP)

FORWARDS(16)
FORWARDS(24)
FORWARDS(32)
FORWARDS(40)
FORWARDS(48)
FORWARDS(64)
// Windows of 7 x 7 and of 8 x 8, with heads of 32 channels as all models of windows have them.
FORWARD(bf16_56, mvk::bf16, 7, true, 4, 32)
FORWARD(f16_56, mvk::f16, 7, true, 4, 32)
FORWARD(bf16_64, mvk::bf16, 8, true, 4, 32)
FORWARD(f16_64, mvk::f16, 8, true, 4, 32)
