// A call of a forward whose blocks go from unit to unit: what the parameters of all of its kernels have in common.
#pragma once

#include "walk.cuh"

#define WALK_POINTERS(TYPE)                                                                                   \
  const TYPE *q, const TYPE *k, const TYPE *v, TYPE *o, const TYPE *bias, int64_t qb, int64_t qh, int64_t kb, \
      int64_t kh, int64_t vb, int64_t vh, int64_t ob, int64_t oh
#define WALK_STRIDES int qd, int qy, int qx, int kd, int ky, int kx, int vd, int vy, int vx, int od, int oy, int ox
#define WALK_GROUPS                                                                                                  \
  int tokens, int d, int dv, int heads, int height, int width, int ph, int pw, int sy, int sx, int down, int across, \
      int windows, int items, int steps, int step_y, int step_x, int last_y, int last_x

#define WALK_GIVEN                                                         \
  {{q, qb, qh, qd, qy, qx},                                                \
   {k, kb, kh, kd, ky, kx},                                                \
   {v, vb, vh, vd, vy, vx},                                                \
   {o, ob, oh, od, oy, ox},                                                \
   {heads, height, width, ph, pw, sy, sx, down, across, windows, 0, 0, 0}, \
   d,                                                                      \
   dv,                                                                     \
   tokens,                                                                 \
   items,                                                                  \
   steps,                                                                  \
   step_y,                                                                 \
   step_x,                                                                 \
   last_y,                                                                 \
   last_x}
