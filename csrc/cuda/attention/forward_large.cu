// The forward's kernels for groups of 65 to 256 tokens with a bias and heads of 32 channels: large.cuh, for each type.
#include "large.cuh"
#include "walk_call.cuh"

#define FORWARD(NAME, TYPE, WARPS, BLOCKS, TILES, DP)                                                               \
  extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) attention_forward_large_##NAME##_##WARPS##_##DP( \
      WALK_POINTERS(TYPE), WALK_STRIDES, int tiles, WALK_GROUPS, int rows, float scale, float scale2) {             \
    extern __shared__ __align__(16) unsigned char global_smem[];                                                    \
    mvk::attention::forward_large<mvk::Halves<TYPE>, DP, WARPS, TILES>(                                             \
        {WALK_GIVEN, {{bias, heads, tiles}, scale, scale2}, rows}, global_smem);                                    \
  }
// Blocks of nine warps that a processor is to hold; from sm_100 on the compiler needs more registers than two leave.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define BLOCKS_OF_NINE 1
#else
#define BLOCKS_OF_NINE 2
#endif
// A warp for each 16 tokens: of windows of 12 x 12, of maps of 14 x 14, and of the largest groups.
#define FORWARDS(NAME, TYPE, DP)                \
  FORWARD(NAME, TYPE, 9, BLOCKS_OF_NINE, 3, DP) \
  FORWARD(NAME, TYPE, 13, 1, 5, DP)             \
  FORWARD(NAME, TYPE, 16, 1, 4, DP)

FORWARDS(bf16, mvk::bf16, 32)
FORWARDS(f16, mvk::f16, 32)
