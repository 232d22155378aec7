// The forward's kernels for groups of 65 to 256 tokens with a bias and heads of 32 channels: large.cuh, for each type.
#include "large.cuh"

#define FORWARD(NAME, TYPE, WARPS, BLOCKS, TILES, DP)                                                                 \
  extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) attention_forward_large_##NAME##_##WARPS##_##DP(   \
      const TYPE* q, const TYPE* k, const TYPE* v, TYPE* o, const TYPE* bias, int64_t qb, int64_t qh, int64_t kb,     \
      int64_t kh, int64_t vb, int64_t vh, int64_t ob, int64_t oh, int qd, int qy, int qx, int kd, int ky, int kx,     \
      int vd, int vy, int vx, int od, int oy, int ox, int tiles, int tokens, int d, int dv, int heads, int height,    \
      int width, int ph, int pw, int sy, int sx, int down, int across, int windows, int items, int steps, int step_y, \
      int step_x, int last_y, int last_x, int rows, float scale, float scale2) {                                      \
    extern __shared__ __align__(16) unsigned char global_smem[];                                                      \
    mvk::attention::forward_large<mvk::Halves<TYPE>, DP, WARPS, TILES>(                                               \
        {{{q, qb, qh, qd, qy, qx},                                                                                    \
          {k, kb, kh, kd, ky, kx},                                                                                    \
          {v, vb, vh, vd, vy, vx},                                                                                    \
          {o, ob, oh, od, oy, ox},                                                                                    \
          {heads, height, width, ph, pw, sy, sx, down, across, windows, 0, 0, 0},                                     \
          d,                                                                                                          \
          dv,                                                                                                         \
          tokens,                                                                                                     \
          items,                                                                                                      \
          steps,                                                                                                      \
          step_y,                                                                                                     \
          step_x,                                                                                                     \
          last_y,                                                                                                     \
          last_x},                                                                                                    \
         {{bias, heads, tiles}, scale, scale2},                                                                       \
         rows},                                                                                                       \
        global_smem);                                                                                                 \
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
