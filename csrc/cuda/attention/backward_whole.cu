// The backward's kernels for groups of up to 64 tokens, and of 129 to 144: backward_whole.cuh, for each type.
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
#define PLAIN_WHOLES(DP)                           \
  WHOLE(bf16_plain, mvk::bf16, true, 16, 4, 4, DP) \
  WHOLE(bf16_plain, mvk::bf16, true, 64, 4, 4, DP) \
  WHOLE(f16_plain, mvk::f16, true, 16, 4, 4, DP)   \
  WHOLE(f16_plain, mvk::f16, true, 64, 4, 4, DP)

PLAIN_WHOLES(16)
PLAIN_WHOLES(24)
PLAIN_WHOLES(32)
PLAIN_WHOLES(40)
PLAIN_WHOLES(48)
PLAIN_WHOLES(64)
// Windows of 7 x 7 and of 8 x 8, with heads of 32 channels as all models of windows have them.
WHOLE(bf16, mvk::bf16, false, 56, 4, 4, 32)
WHOLE(f16, mvk::f16, false, 56, 4, 4, 32)
WHOLE(bf16, mvk::bf16, false, 64, 4, 4, 32)
WHOLE(f16, mvk::f16, false, 64, 4, 4, 32)
// Windows of 12 x 12: nine warps with 168 registers each, which is not enough from sm_100 on.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 1000
WHOLE(bf16, mvk::bf16, false, 144, 9, 1, 32)
WHOLE(f16, mvk::f16, false, 144, 9, 1, 32)
#endif
