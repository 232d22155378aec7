// Softmax attention with a bias inside groups of 65 to 256 pixels, forward, in half types.
//
// A block has units of one head, one after the other; while it computes one, the rows of the next come to shared
// memory. A warp has 16 queries of each, and goes over the keys, TILES times 16 at once, as in queries.cuh. A bias
// stays in the first-level cache from one unit to the next. q, k, v and out move once.
#pragma once

#include "queries.cuh"
#include "walk.cuh"

namespace mvk::attention {

template <typename T>
struct Large {
  Walked<T> walked;
  Scores<T> scores;
  int rows;  // in shared memory, a multiple of those that are added at once
};

// Adds all keys, whose rows are at `key` and take `bytes`; so do those of v, which follow.
template <class P, int DP, Keys KEYS, int TILES>
__device__ __forceinline__ void add_all(
    Queries<P, DP>& queries, const Scores<typename P::Element>& scores, const uint16_t* masks, uint32_t key,
    uint32_t bytes, const typename P::Element* bias, const Lanes<P, DP>& lanes) {
  const uint32_t end = key + bytes;
#pragma unroll 1
  while (key != end) {
    add_keys<P, DP, KEYS, TILES>(queries, scores, true, masks, key, key + bytes, bias, LOG2E, lanes);
    masks += TILES, key += TILES * 16 * P::stride(DP) * sizeof(typename P::Element), bias += TILES * 256;
  }
}

template <class P, int DP, int WARPS, int TILES>
__device__ __forceinline__ void forward_large(const Large<typename P::Element>& given, unsigned char* shared) {
  using T = typename P::Element;
  constexpr int SIZE = sizeof(T), ROW = P::stride(DP) * SIZE;
  const int lane = lane_id(), warp = threadIdx.x >> 5, head = blockIdx.x % given.walked.groups.heads;
  const int rows = given.rows;
  Walk<P, DP, true, false>::find_places(given.walked, shared, rows);
  // Rows that no warp brings. Their keys have no weight, but 0 times what lies there may be NaN.
  for (int at = threadIdx.x; at < 6 * rows * ROW / 4; at += 32 * WARPS) {
    if (at * 4 % (rows * ROW) >= 16 * WARPS * ROW) reinterpret_cast<uint32_t*>(shared)[at] = 0;
  }
  __syncthreads();
  const Lanes<P, DP> lanes;
  const T* const bias = given.scores.bias.template row<false>(head, warp);
  Walk<P, DP, true, false> walk(given.walked, shared, rows);
#pragma unroll 1
  for (; walk.more(); walk.leave()) {
    walk.enter();
    __syncwarp();
    if (warp * 16 >= given.walked.tokens) continue;
    const uint32_t own = shared_address(shared) + walk.buffer + 16 * warp * ROW;
    const uint32_t keys = shared_address(shared) + walk.buffer + rows * ROW;
    const uint16_t* const masks = reinterpret_cast<const uint16_t*>(walk.words());
    Queries<P, DP> queries;
    queries.q.load(own, lanes);
    do {
      queries.begin();
      if (walk.cut()) {
        add_all<P, DP, Keys::CUT, TILES>(queries, given.scores, masks, keys, rows * ROW, bias, lanes);
      } else {
        add_all<P, DP, Keys::BIASED, TILES>(queries, given.scores, masks, keys, rows * ROW, bias, lanes);
      }
    } while (queries.again());
    __syncwarp();
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float over = reciprocal_fast(queries.total[r]);
      const uint32_t at = own + (lane / 4 + 8 * r) * ROW + 2 * (lane & 3) * SIZE;
#pragma unroll
      for (int n = 0; n < DP / 8; n++)
        P::store(at + n * 8 * SIZE, queries.o[n][2 * r] * over, queries.o[n][2 * r + 1] * over);
    }
    __syncwarp();
    walk.store();
  }
}

}  // namespace mvk::attention
