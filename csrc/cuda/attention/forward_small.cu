// The forward's kernels for groups of 49 to 64 tokens: small.cuh, for each type.
#include "small.cuh"

#define FORWARD(NAME, TYPE, COLUMNS, BIASED, BLOCKS, DP)                                                              \
  extern "C" __global__ void __launch_bounds__(128, BLOCKS) attention_forward_small_##NAME##_##DP(                    \
      const TYPE* q, const TYPE* k, const TYPE* v, TYPE* o, const TYPE* bias, int64_t qb, int64_t qh, int64_t kb,     \
      int64_t kh, int64_t vb, int64_t vh, int64_t ob, int64_t oh, int64_t bh, int qd, int qy, int qx, int kd, int ky, \
      int kx, int vd, int vy, int vx, int od, int oy, int ox, int bm, int bn, int tokens, int d, int dv, int heads,   \
      int height, int width, int ph, int pw, int sy, int sx, int down, int across, int windows, int items, int steps, \
      int step_y, int step_x, int last_y, int last_x, float scale, float scale2) {                                    \
    extern __shared__ __align__(16) unsigned char global_smem[];                                                      \
    mvk::attention::forward_small<mvk::Halves<TYPE>, DP, COLUMNS, BIASED>(                                            \
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
         {bias, bh, bm, bn},                                                                                          \
         scale,                                                                                                       \
         scale2},                                                                                                     \
        global_smem);                                                                                                 \
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
