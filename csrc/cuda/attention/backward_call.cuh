// A call of the backward: its arguments, and the parameters of all of its kernels, which are the same.
#pragma once

#include "ordered_bias.cuh"
#include "products.cuh"
#include "rows.cuh"

namespace mvk::attention {

template <typename T>
struct Backward {
  Map<const T> query, key, value, grad;
  Map<T> query_grad, key_grad, value_grad;
  Scores<T> scores;
  int tokens;  // of a group at most
  Groups groups;
  int channels, value_channels;
  // With the bias's gradient, a block has units of one head, `steps` for each team in turn, of which there are `items`
  // in all. Sums of dS are left in partial, (parts, heads, tiles of queries, tiles of keys, 16 x 16), a tile as the
  // lanes of a warp hold the sums of two products. A part is a block's where sums are held, else a team's.
  float* partial;
  int steps, items;
  int queries;  // whose dS lies in shared memory at once: a multiple of 16
  int held;     // whether sums of dS lie in shared memory until the last unit of a team
  int bytes;    // that rows of all maps are aligned to, where that was asked for
  Divisor by_heads, by_across, by_down;
};

}  // namespace mvk::attention

#define BACKWARD_PARAMETERS(TYPE)                                                                                     \
  const TYPE *q, const TYPE *k, const TYPE *v, const TYPE *g, const TYPE *bias, TYPE *dq, TYPE *dk, TYPE *dv,         \
      float *partial, int64_t qb, int64_t qh, int64_t kb, int64_t kh, int64_t vb, int64_t vh, int64_t gb, int64_t gh, \
      int64_t dqb, int64_t dqh, int64_t dkb, int64_t dkh, int64_t dvb, int64_t dvh, int qd, int qy, int qx, int kd,   \
      int ky, int kx, int vd, int vy, int vx, int gd, int gy, int gx, int dqd, int dqy, int dqx, int dkd, int dky,    \
      int dkx, int dvd, int dvy, int dvx, int tiles, int tokens, int channels, int value_channels, int heads,         \
      int height, int width, int ph, int pw, int sy, int sx, int down, int across, int windows, int units, int rows,  \
      int team, int steps, int items, int queries, int held, int bytes, int by_heads, int heads_shift, int by_across, \
      int across_shift, int by_down, int down_shift, float scale, float scale2

#define BACKWARD_GIVEN                                                                                              \
  {                                                                                                                 \
    {q, qb, qh, qd, qy, qx}, {k, kb, kh, kd, ky, kx}, {v, vb, vh, vd, vy, vx}, {g, gb, gh, gd, gy, gx},             \
        {dq, dqb, dqh, dqd, dqy, dqx}, {dk, dkb, dkh, dkd, dky, dkx}, {dv, dvb, dvh, dvd, dvy, dvx},                \
        {{bias, heads, tiles}, scale, scale2}, tokens,                                                              \
        {heads, height, width, ph, pw, sy, sx, down, across, windows, units, rows, team}, channels, value_channels, \
        partial, steps, items, queries, held, bytes, {static_cast<uint32_t>(by_heads), heads_shift},                \
        {static_cast<uint32_t>(by_across), across_shift}, {                                                         \
      static_cast<uint32_t>(by_down), down_shift                                                                    \
    }                                                                                                               \
  }
