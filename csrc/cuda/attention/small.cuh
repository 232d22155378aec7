// Softmax attention inside groups of 49 to 64 pixels, forward, in half types.
//
// A block of four warps has units of one head, one after the other; while it computes one, the rows of the next come to
// shared memory. A warp has 16 queries. All of their scores are in registers at once, 16 x 8 COLUMNS of them, so that
// there is one maximum and nothing to scale again. Scores begin as bias / scale: that is in registers, from the first
// unit to the last, with -inf for keys beyond the last token. q, k, v and out move once, the bias once for each block.
// What depends on where a token lies in its group is computed once, too; a unit only adds where its group begins.
#pragma once

#include "products.cuh"
#include "walk.cuh"

namespace mvk::attention {

template <typename T>
struct Bias {
  const T* at;
  int64_t head;  // negative: there is no bias
  int query, key;
};

template <typename T>
struct Small {
  Walked<T> walked;
  Bias<T> bias;
  float scale, scale2;
};

template <class P, int DP, int COLUMNS, bool BIASED>
__device__ __forceinline__ void forward_small(const Small<typename P::Element>& given, unsigned char* shared) {
  using T = typename P::Element;
  constexpr int STRIDE = P::stride(DP), SIZE = sizeof(T), ROW = STRIDE * SIZE, TILES = (COLUMNS + 1) / 2;
  constexpr int ROWS = 16 * TILES;
  const int lane = lane_id(), warp = threadIdx.x >> 5, head = blockIdx.x % given.walked.groups.heads;
  Walk<P, DP, BIASED, true>::find_places(given.walked, shared, ROWS);
  float start[BIASED ? COLUMNS : 1][4];
  if constexpr (BIASED) {
    // Beyond the last token that token again, so that all reads go on at once.
    const int last = given.walked.tokens - 1, row = 16 * warp + lane / 4, column = 2 * (lane & 3);
    T of[COLUMNS][4];
    if (given.bias.head >= 0) {
      const T* const from = given.bias.at + head * given.bias.head;
      const T* const rows[2] = {from + min(row, last) * given.bias.query, from + min(row + 8, last) * given.bias.query};
#pragma unroll
      for (int i = 0; i < 4 * COLUMNS; i++) {
        of[i / 4][i % 4] = rows[i / 2 % 2][min(column + i / 4 * 8 + i % 2, last) * given.bias.key];
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4 * COLUMNS; i++) of[i / 4][i % 4] = from_float<T>(0.0f);
    }
    const float over = 1.0f / given.scale;
#pragma unroll
    for (int i = 0; i < 4 * COLUMNS; i++) {
      // What is finite stays finite.
      const float x = to_float(of[i / 4][i % 4]), most = fabsf(x) < INFINITY ? 3e38f : INFINITY, scaled = x * over;
      const float within = scaled > most ? most : scaled < -most ? -most : scaled;
      start[i / 4][i % 4] = column + i / 4 * 8 + i % 2 <= last ? within : -INFINITY;
    }
  }
  __syncthreads();

  Lanes<P, DP> lanes;
  if constexpr (COLUMNS < 8) lanes.keep();
  Walk<P, DP, BIASED, true> walk(given.walked, shared, ROWS);
#pragma unroll 1
  while (walk.more()) {
    walk.enter();
    const uint32_t own = shared_address(shared) + walk.buffer + 16 * warp * ROW;
    const uint32_t keys = shared_address(shared) + walk.buffer + ROWS * ROW, values = keys + ROWS * ROW;
    Channels<P, DP> q;
    q.load(own, lanes);
    float s[2 * TILES][4];
#pragma unroll
    for (int j = 0; j < TILES; j++) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int n = 2 * j + i / 4;
        s[n][i % 4] = BIASED && n < COLUMNS ? start[n < COLUMNS && BIASED ? n : 0][i % 4] : 0.0f;
      }
#pragma unroll
      for (int k = 0; k < DP / 16; k++) {
        typename P::template Right<16> b[2];
        P::load(b, keys + j * 16 * ROW + 16 * k * SIZE, lanes);
        P::template multiply<false>(s[2 * j], q.of[k], b[0]);
        if (2 * j + 1 < COLUMNS) P::template multiply<false>(s[2 * j + 1], q.of[k], b[1]);
      }
      if constexpr (DP % 16 != 0) {
        typename P::template Right<8> b[2];
        P::load(b, keys + j * 16 * ROW + DP / 16 * 16 * SIZE, lanes);
        P::template multiply<false>(s[2 * j], q.rest, b[0]);
        if (2 * j + 1 < COLUMNS) P::template multiply<false>(s[2 * j + 1], q.rest, b[1]);
      }
    }
    if (walk.cut()) {
#pragma unroll
      for (int half = 0; half < (TILES + 1) / 2; half++) {
        const uint32_t there = walk.words()[half] >> 2 * (lane & 3);
#pragma unroll
        for (int i = 0; i < 16; i++) {
          const int n = 4 * half + i / 4;
          if (n < COLUMNS && !(there >> (i / 4 * 8 + i % 2) & 1)) s[n][i % 4] = -INFINITY;
        }
      }
    }
    float highest[2] = {s[0][0], s[0][2]};
#pragma unroll
    for (int i = 0; i < 4 * COLUMNS; i++) highest[i / 2 % 2] = fmaxf(highest[i / 2 % 2], s[i / 4][i % 4]);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      highest[r] = max_of_row(highest[r]);
      // A row of -inf alone must come out as NaN (0 / 0), without -inf - -inf on the way.
      if (highest[r] == -INFINITY) highest[r] = 0.0f;
    }
    // Sums of rounded weights are products with ones, see queries.cuh.
    float o[DP / 8][4] = {}, sums[4] = {};
    typename P::template Right<16> ones;
    P::set_ones(ones);
#pragma unroll
    for (int j = 0; j < TILES; j++) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        float& x = s[2 * j + i / 4][i % 4];
        x = 2 * j + i / 4 < COLUMNS ? exp2_fast((x - highest[i / 2 % 2]) * given.scale2) : 0.0f;
      }
      typename P::template Left<16> p;
      P::from_sums(p, s[2 * j], s[2 * j + 1]);
      P::template multiply<false>(sums, p, ones);
      add_tokens<P, DP / 8>(o, p, values + j * 16 * ROW, lanes);
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float over = reciprocal_fast(sums[2 * r]);
      const uint32_t at = own + (lane / 4 + 8 * r) * ROW + 2 * (lane & 3) * SIZE;
#pragma unroll
      for (int n = 0; n < DP / 8; n++) P::store(at + n * 8 * SIZE, o[n][2 * r] * over, o[n][2 * r + 1] * over);
    }
    __syncwarp();
    walk.store();
    walk.leave();
  }
}

}  // namespace mvk::attention
