// The backward's kernels for groups of up to 64 tokens: backward_whole.cuh, for each type and each number of channels.
#include "backward_whole.cuh"

// From sm_100 on the compiler needs more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define MOST(BLOCKS) (BLOCKS < 3 ? BLOCKS : 3)
#else
#define MOST(BLOCKS) BLOCKS
#endif

#define WHOLE(NAME, TYPE, PLAIN, TOKENS, WARPS, BLOCKS, DP)                                       \
  extern "C" __global__ void __launch_bounds__(32 * WARPS, MOST(BLOCKS))                          \
      attention_backward_##NAME##_##TOKENS##_##DP(BACKWARD_PARAMETERS(TYPE)) {                    \
    extern __shared__ __align__(16) unsigned char global_smem[];                                  \
    const mvk::attention::Backward<TYPE> given = BACKWARD_GIVEN;                                  \
    mvk::attention::Whole<mvk::Halves<TYPE>, DP, PLAIN, TOKENS, WARPS>(given, global_smem).run(); \
  }
// BLOCKS a processor: masks, a bias and many channels want more registers than four leave.
#define WHOLES_OF(NAME, TYPE, BLOCKS, DP)       \
  WHOLE(NAME##_plain, TYPE, true, 16, 4, 4, DP) \
  WHOLE(NAME##_plain, TYPE, true, 64, 4, 4, DP) \
  WHOLE(NAME, TYPE, false, 64, 4, BLOCKS, DP)
#define WHOLES(BLOCKS, DP)               \
  WHOLES_OF(bf16, mvk::bf16, BLOCKS, DP) \
  WHOLES_OF(f16, mvk::f16, BLOCKS, DP)

WHOLES(4, 16)
WHOLES(3, 24)
WHOLES(4, 32)
WHOLES(3, 40)
WHOLES(3, 48)
WHOLES(3, 64)
// Windows of 7 x 7.
WHOLE(bf16, mvk::bf16, false, 56, 4, 4, 32)
WHOLE(f16, mvk::f16, false, 56, 4, 4, 32)
// Windows of 12 x 12: nine warps with 168 registers each, which is not enough from sm_100 on.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 1000
WHOLE(bf16, mvk::bf16, false, 144, 9, 1, 32)
WHOLE(f16, mvk::f16, false, 144, 9, 1, 32)
#endif
