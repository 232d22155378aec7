// The backward's kernels: backward.cuh, for each type and each number of channels.
#include "backward.cuh"

#define BACKWARD(NAME, TYPE, PRODUCTS, PLAIN, TILES, WARPS, BLOCKS, DP)                                               \
  extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) attention_backward_##NAME##_##DP(                  \
      const TYPE* q, const TYPE* k, const TYPE* v, const TYPE* g, const TYPE* bias, TYPE* dq, TYPE* dk, TYPE* dv,     \
      float* partial, int64_t qb, int64_t qh, int64_t kb, int64_t kh, int64_t vb, int64_t vh, int64_t gb, int64_t gh, \
      int64_t dqb, int64_t dqh, int64_t dkb, int64_t dkh, int64_t dvb, int64_t dvh, int64_t bh, int qd, int qy,       \
      int qx, int kd, int ky, int kx, int vd, int vy, int vx, int gd, int gy, int gx, int dqd, int dqy, int dqx,      \
      int dkd, int dky, int dkx, int dvd, int dvy, int dvx, int bm, int bn, int tokens, int channels,                 \
      int value_channels, int heads, int height, int width, int ph, int pw, int sy, int sx, int down, int across,     \
      int windows, int units, int rows, int team, int steps, int items, int queries, int held, float scale,           \
      float scale2) {                                                                                                 \
    extern __shared__ __align__(16) unsigned char global_smem[];                                                      \
    mvk::attention::backward<PRODUCTS, DP, PLAIN, TILES, WARPS>(                                                      \
        {{q, qb, qh, qd, qy, qx},                                                                                     \
         {k, kb, kh, kd, ky, kx},                                                                                     \
         {v, vb, vh, vd, vy, vx},                                                                                     \
         {g, gb, gh, gd, gy, gx},                                                                                     \
         {dq, dqb, dqh, dqd, dqy, dqx},                                                                               \
         {dk, dkb, dkh, dkd, dky, dkx},                                                                               \
         {dv, dvb, dvh, dvd, dvy, dvx},                                                                               \
         {bias, bh, bm, bn, tokens},                                                                                  \
         {heads, height, width, ph, pw, sy, sx, down, across, windows, units, rows, team},                            \
         channels,                                                                                                    \
         value_channels,                                                                                              \
         scale,                                                                                                       \
         scale2,                                                                                                      \
         partial,                                                                                                     \
         steps,                                                                                                       \
         items,                                                                                                       \
         queries,                                                                                                     \
         held},                                                                                                       \
        global_smem);                                                                                                 \
  }
// Sixteen warps for units of more than 128 tokens, eight for others; with masks, a bias and 64 channels a warp needs more
// registers than there are for so many warps: those own 32 keys each, and so do all in float32.
#define PLAIN_BACKWARDS(NAME, TYPE, DP)                              \
  BACKWARD(NAME##_plain, TYPE, mvk::Halves<TYPE>, true, 1, 8, 2, DP) \
  BACKWARD(NAME##_large_plain, TYPE, mvk::Halves<TYPE>, true, 1, 16, 1, DP)
#define BACKWARDS_OF_HALVES(NAME, TYPE, DP)                   \
  PLAIN_BACKWARDS(NAME, TYPE, DP)                             \
  BACKWARD(NAME, TYPE, mvk::Halves<TYPE>, false, 1, 8, 2, DP) \
  BACKWARD(NAME##_large, TYPE, mvk::Halves<TYPE>, false, 1, 16, 1, DP)
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
PLAIN_BACKWARDS(bf16, mvk::bf16, 64)
PLAIN_BACKWARDS(f16, mvk::f16, 64)
BACKWARD(bf16, mvk::bf16, mvk::Halves<mvk::bf16>, false, 2, 8, 1, 64)
BACKWARD(f16, mvk::f16, mvk::Halves<mvk::f16>, false, 2, 8, 1, 64)
