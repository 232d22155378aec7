// The backward's first pass: what is known of the rows of scores, 16 queries to a warp. Also what all of its passes
// share: a unit in shared memory.
#pragma once

#include "backward_call.cuh"

namespace mvk::attention {

// What a team has, found once.
struct Kept {
  Unit unit;
  int64_t part;  // where in Backward::partial its sums of dS are
};

// A unit in shared memory.
template <class P, int DP>
struct Place {
  using T = typename P::Element;
  static constexpr int STRIDE = P::stride(DP), ROW = STRIDE * sizeof(T);
  T *query, *key, *value, *grad;
  T* pairs;    // dS: a row a key
  int stride;  // of pairs
  // Of 16 queries each: the score that is subtracted, the logarithm of 1 / the sum of weights, delta.
  static constexpr int FOUND = 48;
  float* found;
  float4* sums;  // of dS over units, where these are held
  Kept* kept;
  int* pixels;
  uint32_t* masks;

  __device__ __forceinline__ Place(unsigned char* shared, int units, int mine, int rows, int queries, int held) {
    query = reinterpret_cast<T*>(shared) + mine * 4 * rows * STRIDE;
    key = query + rows * STRIDE, value = key + rows * STRIDE, grad = value + rows * STRIDE;
    shared += units * 4 * rows * ROW;
    stride = P::pairs_stride(queries);
    pairs = reinterpret_cast<T*>(shared) + mine * rows * stride;
    shared += units * rows * stride * sizeof(T);
    found = reinterpret_cast<float*>(shared) + mine * 3 * rows;
    shared += units * 12 * rows;
    sums = reinterpret_cast<float4*>(shared) + mine * (rows * rows / 4);
    if (held) shared += units * rows * rows * 4;
    kept = reinterpret_cast<Kept*>(shared) + mine;
    shared += units * sizeof(Kept);
    pixels = reinterpret_cast<int*>(shared) + mine * (rows + rows / 16);
    masks = reinterpret_cast<uint32_t*>(pixels + rows);
  }
};

// What a warp finds of 16 queries: the highest score of the keys that were searched for it, and sums of weights, and of
// weights times dP. `careful`: as in the forward, the next keys have to be searched.
template <class P, int DP>
struct RowSums {
  Channels<P, DP> q, g;
  float top[2] = {-INFINITY, -INFINITY}, used[2], total[2] = {0.0f, 0.0f}, delta[2] = {0.0f, 0.0f};
  bool careful = true;
};

// Adds the TILES times 16 keys from tile `first` on, and says whether it could, or has to be called again.
template <class P, int DP, bool PLAIN, int TILES>
__device__ __forceinline__ bool add_keys_to_rows(
    RowSums<P, DP>& to, const Backward<typename P::Element>& given, const Place<P, DP>& place, const Unit& unit,
    const typename P::Element* bias, int first, const Lanes<P, DP>& lanes) {
  constexpr int ROW = Place<P, DP>::ROW;
  const bool biased = !PLAIN && given.scores.bias.exists();
  const float factor = PLAIN ? given.scores.scale2 : given.scores.factor();
  const uint32_t key = shared_address(place.key) + first * 16 * ROW;
  const uint32_t value = shared_address(place.value) + first * 16 * ROW;
  float s[TILES][2][4];
#pragma unroll
  for (int j = 0; j < TILES; j++) {
    to.q.template multiply<false>(s[j], key + j * 16 * ROW, lanes);
    if (biased) {
      OrderedBias<typename P::Element>::add(s[j], given.scores.scale, bias + (first + j) * 256);
    } else if (!PLAIN && given.scores.scale2 <= 0) {
#pragma unroll
      for (int i = 0; i < 8; i++) s[j][i / 4][i % 4] *= given.scores.scale;
    }
    // A bias is -inf beyond the last token.
    if (!PLAIN && (biased ? unit.cut : !unit.full)) mask_columns(s[j], place.masks[first + j], -INFINITY);
  }
  if (to.careful) {
    float highest[2] = {to.top[0], to.top[1]};
#pragma unroll
    for (int i = 0; i < 8 * TILES; i++) highest[i / 2 % 2] = fmaxf(highest[i / 2 % 2], s[i / 8][i / 4 % 2][i % 4]);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      highest[r] = max_of_row(highest[r]);
      to.used[r] = highest[r] == -INFINITY ? 0.0f : highest[r];
      const float shrink = exp2_fast((to.top[r] - to.used[r]) * factor);
      to.total[r] *= shrink, to.delta[r] *= shrink;
      to.top[r] = highest[r];
    }
  }
  float parts[2][2] = {};
#pragma unroll
  for (int i = 0; i < 8 * TILES; i++) {
    float& x = s[i / 8][i / 4 % 2][i % 4];
    x = exp2_fast((x - to.used[i / 2 % 2]) * factor);
    parts[i / 2 % 2][i % 2] += x;
  }
  const float total[2] = {parts[0][0] + parts[0][1], parts[1][0] + parts[1][1]};
  if (to.careful) {
    to.careful = __any_sync(~0u, to.top[0] == -INFINITY || to.top[1] == -INFINITY);
  } else if (__any_sync(~0u, !(fmaxf(total[0], total[1]) < 32768.0f))) {
    to.careful = true;
    return false;
  }
  to.total[0] += total[0], to.total[1] += total[1];
#pragma unroll
  for (int j = 0; j < TILES; j++) {
    float dp[2][4];
    to.g.template multiply<false>(dp, value + j * 16 * ROW, lanes);
    if (!PLAIN && !unit.full) mask_columns(dp, place.masks[first + j], 0.0f);
#pragma unroll
    for (int i = 0; i < 8; i++) to.delta[i / 2 % 2] = fmaf(s[j][i / 4][i % 4], dp[i / 4][i % 4], to.delta[i / 2 % 2]);
  }
  return true;
}

// What is known of the rows of 16 queries: the score that is subtracted, the logarithm of 1 / the sum of 2^(score -
// that), and delta.
template <class P, int DP, bool PLAIN>
__device__ __forceinline__ void find_rows(
    const Backward<typename P::Element>& given, const Place<P, DP>& place, const Unit& unit, int tile) {
  constexpr int ROW = Place<P, DP>::ROW, AT_ONCE = !P::HALF ? 1 : PLAIN && DP <= 40 ? 4 : 2;
  const int lane = lane_id(), tiles = given.groups.rows / 16;
  const Lanes<P, DP> lanes;
  RowSums<P, DP> found;
  found.q.load(shared_address(place.query) + tile * 16 * ROW, lanes);
  found.g.load(shared_address(place.grad) + tile * 16 * ROW, lanes);
  const typename P::Element* const bias = PLAIN ? nullptr : given.scores.bias.template row<false>(unit.head, tile);
  int first = 0;
#pragma unroll 1
  while (first + AT_ONCE <= tiles) {
    if (add_keys_to_rows<P, DP, PLAIN, AT_ONCE>(found, given, place, unit, bias, first, lanes)) first += AT_ONCE;
  }
  if constexpr (AT_ONCE > 1) {
#pragma unroll 1
    while (first < tiles) {
      if (add_keys_to_rows<P, DP, PLAIN, 1>(found, given, place, unit, bias, first, lanes)) first++;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    found.total[r] = sum_of_row(found.total[r]), found.delta[r] = sum_of_row(found.delta[r]);
    if ((lane & 3) == 0) {
      float* const to = place.found + tile * Place<P, DP>::FOUND + (lane >> 2) + 8 * r;
      const float share = reciprocal_fast(found.total[r]);
      to[0] = found.used[r], to[16] = log2_fast(share), to[32] = found.delta[r] * share;
    }
  }
}

}  // namespace mvk::attention
