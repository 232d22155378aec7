// Softmax attention inside groups of pixels, backward.
//
// With P the probabilities, dP = dout V^T and delta the row sums of P dP: dV = P^T dout, dS = P (dP - delta),
// dQ = scale dS K, dK = scale dS^T Q. A team of warps has one unit, whose q, k, v and dout it brings to shared memory,
// once. Two passes over the scores follow.
//
// Queries: each warp takes 16 at a time, goes over the keys with a running maximum, and leaves the maximum, 1 / sum and
// delta of each row. Keys: each warp owns 32, whose dK and dV are in its registers while it goes over the queries, 16 at a
// time. Rows of its tiles are keys, so P and dS become left operands where they are. dS goes to shared memory as well, by
// way of which the team finishes dQ of these queries. Each gradient then leaves by way of the place of its input, in
// whole rows, and is stored once.
//
// P is made of the same bits in both passes: delta of a row whose P is 1 somewhere is that key's dP, and dS is 0.
#pragma once

#include "products.cuh"
#include "rows.cuh"

namespace mvk::attention {

template <typename T>
struct Backward {
  Map<const T> query, key, value, grad;
  Map<T> query_grad, key_grad, value_grad;
  Bias<T> bias;
  Groups groups;
  int channels, value_channels;
  float scale, scale2;
  // With the bias's gradient, a block has units of one head, `steps` for each team in turn, of which there are `items`
  // in all; sums of dS are left in partial (teams of the grid, heads, queries, keys).
  float* partial;
  int steps, items;
};

// A unit in shared memory.
template <class P, int DP>
struct Place {
  using T = typename P::Element;
  static constexpr int STRIDE = P::stride(DP), ROW = STRIDE * sizeof(T), PAIRS = P::TOKENS * sizeof(T);
  T *query, *key, *value, *grad;
  T* pairs;  // twice: rows of keys, of which each has 16 queries
  float *top, *share, *delta;
  int* pixels;
  uint32_t* masks;

  __device__ __forceinline__ Place(unsigned char* shared, int units, int mine, int rows) {
    query = reinterpret_cast<T*>(shared) + mine * 4 * rows * STRIDE;
    key = query + rows * STRIDE, value = key + rows * STRIDE, grad = value + rows * STRIDE;
    shared += units * 4 * rows * ROW;
    pairs = reinterpret_cast<T*>(shared) + mine * 2 * rows * P::TOKENS;
    shared += units * 2 * rows * PAIRS;
    top = reinterpret_cast<float*>(shared) + mine * 3 * rows, share = top + rows, delta = share + rows;
    shared += units * 12 * rows;
    pixels = reinterpret_cast<int*>(shared) + mine * (rows + rows / 16);
    masks = reinterpret_cast<uint32_t*>(pixels + rows);
  }
};

// What is known of the rows of 16 queries: their highest score, 1 / the sum of 2^(score - highest), and delta.
template <class P, int DP>
__device__ __forceinline__ void find_rows(
    const Backward<typename P::Element>& given, const Place<P, DP>& place, const Unit& unit, int tile, bool scaled,
    float factor) {
  constexpr int ROW = Place<P, DP>::ROW, AT_ONCE = 4;
  const int lane = lane_id(), rows = given.groups.rows;
  Channels<P, DP> q, g;
  q.load(shared_address(place.query) + tile * 16 * ROW);
  g.load(shared_address(place.grad) + tile * 16 * ROW);
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f}, delta[2] = {0.0f, 0.0f};
#pragma unroll 1
  for (int first = 0; first * 16 < rows; first += AT_ONCE) {
    const int count = rows / 16 - first;
    float s[AT_ONCE][2][4];
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
#pragma unroll
      for (int i = 0; i < 8; i++) s[j][i / 4][i % 4] = -INFINITY;
      if (j >= count) continue;
      q.template multiply<false>(s[j], shared_address(place.key) + (first + j) * 16 * ROW);
      if (scaled) given.bias.template scale<false>(s[j], given.scale2, unit.head, tile * 16, (first + j) * 16);
      if (!unit.full) mask_columns(s[j], place.masks[first + j], -INFINITY);
    }
    float used[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float highest = top[r];
#pragma unroll
      for (int i = 0; i < 4 * AT_ONCE; i++) highest = fmaxf(highest, s[i / 4][i / 2 % 2][2 * r + i % 2]);
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
      used[r] = highest == -INFINITY ? 0.0f : highest;
      const float shrink = exp2_fast((top[r] - used[r]) * factor);
      total[r] *= shrink, delta[r] *= shrink;
      top[r] = highest;
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      if (j >= count) continue;
      float dp[2][4];
      g.template multiply<false>(dp, shared_address(place.value) + (first + j) * 16 * ROW);
      if (!unit.full) mask_columns(dp, place.masks[first + j], 0.0f);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float p = exp2_fast((s[j][i / 4][i % 4] - used[i / 2 % 2]) * factor);
        total[i / 2 % 2] += p;
        delta[i / 2 % 2] = fmaf(p, dp[i / 4][i % 4], delta[i / 2 % 2]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
#pragma unroll
    for (int apart = 1; apart < 4; apart *= 2) {
      total[r] += __shfl_xor_sync(~0u, total[r], apart);
      delta[r] += __shfl_xor_sync(~0u, delta[r], apart);
    }
    if ((lane & 3) == 0) {
      const int row = tile * 16 + (lane >> 2) + 8 * r;
      const float share = 1.0f / total[r];
      place.top[row] = top[r] == -INFINITY ? 0.0f : top[r];
      place.share[row] = share, place.delta[row] = delta[r] * share;
    }
  }
}

// dK and dV of 32 keys, of which `count` times 16 exist, from 16 queries; dS of these is left in place.pairs.
template <class P, int DP>
__device__ __forceinline__ void add_queries(
    float (&dk)[2][DP / 8][4], float (&dv)[2][DP / 8][4], const Backward<typename P::Element>& given,
    const Place<P, DP>& place, const Unit& unit, int first, int count, int block, bool scaled, float factor,
    float* partial, bool more) {
  constexpr int ROW = Place<P, DP>::ROW, PAIRS = Place<P, DP>::PAIRS;
  const int lane = lane_id(), query = block * 16 + 2 * (lane & 3), second = first + count - 1;
  const uint32_t k[2] = {shared_address(place.key) + first * 16 * ROW, shared_address(place.key) + second * 16 * ROW};
  const uint32_t v[2] = {
      shared_address(place.value) + first * 16 * ROW, shared_address(place.value) + second * 16 * ROW};
  const uint32_t q = shared_address(place.query) + block * 16 * ROW;
  const uint32_t g = shared_address(place.grad) + block * 16 * ROW;

  float p[2][2][4];
  multiply_turned<P, DP>(p, k, q);
  if (scaled) {
    given.bias.template scale<true>(p[0], given.scale2, unit.head, block * 16, first * 16);
    given.bias.template scale<true>(p[1], given.scale2, unit.head, block * 16, second * 16);
  }
#pragma unroll
  for (int n = 0; n < 2; n++) {
    const float2 top = *reinterpret_cast<const float2*>(place.top + query + 8 * n);
    const float2 share = *reinterpret_cast<const float2*>(place.share + query + 8 * n);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float& x = p[i / 4][n][i % 4];
      x = exp2_fast((x - (i % 2 ? top.y : top.x)) * factor) * (i % 2 ? share.y : share.x);
    }
  }
  float ds[2][2][4];
  multiply_turned<P, DP>(ds, v, g);
#pragma unroll
  for (int n = 0; n < 2; n++) {
    const float2 delta = *reinterpret_cast<const float2*>(place.delta + query + 8 * n);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float& x = ds[i / 4][n][i % 4];
      x = p[i / 4][n][i % 4] * (x - (i % 2 ? delta.y : delta.x));
    }
  }
  if (!unit.full) {
    const uint32_t queries = place.masks[block] >> 2 * (lane & 3);
#pragma unroll
    for (int m = 0; m < 2; m++) {
      const uint32_t keys = place.masks[m ? second : first] >> (lane >> 2);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const bool there = keys >> (i / 2 % 2 * 8) & queries >> (i / 4 * 8 + i % 2) & 1;
        if (!there) p[m][i / 4][i % 4] = ds[m][i / 4][i % 4] = 0.0f;
      }
    }
  }
  if (partial != nullptr) {
    const int tokens = given.bias.tokens;
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const int m = query + i / 4 % 2 * 8 + i % 2, n = (first + i / 8) * 16 + (lane >> 2) + i / 2 % 2 * 8;
      if (i / 8 < count && m < tokens && n < tokens) {
        float* sum = partial + m * tokens + n;
        *sum = ds[i / 8][i / 4 % 2][i % 4] + (more ? *sum : 0.0f);
      }
    }
  }
  typename P::template Left<16> left[2];
#pragma unroll
  for (int m = 0; m < 2; m++) P::from_sums(left[m], p[m][0], p[m][1]);
  add_tokens<P, DP>(dv, left, g);
  const uint32_t pairs = shared_address(place.pairs) + (block & 1) * given.groups.rows * PAIRS;
#pragma unroll
  for (int m = 0; m < 2; m++) {
    P::from_sums(left[m], ds[m][0], ds[m][1]);
    if (m < count) P::store_tokens(pairs + (first + m) * 16 * PAIRS, left[m], ds[m][0], ds[m][1]);
  }
  add_tokens<P, DP>(dk, left, q);
}

// Eight columns of dQ of 16 queries, to the queries' place.
template <class P, int DP>
__device__ __forceinline__ void finish_queries(
    const Place<P, DP>& place, int rows, int block, int column, float scale) {
  constexpr int ROW = Place<P, DP>::ROW, PAIRS = Place<P, DP>::PAIRS, SIZE = sizeof(typename P::Element);
  const uint32_t pairs = shared_address(place.pairs) + (block & 1) * rows * PAIRS;
  const uint32_t keys = shared_address(place.key) + column * 8 * SIZE;
  float dq[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
  for (int j = 0; j < rows / 16; j++) {
    typename P::template Left<16> a;
    typename P::template Right<16> b[1];
    P::load_transposed(a, pairs + j * 16 * PAIRS, P::TOKENS);
    P::load_tokens(b, keys + j * 16 * ROW, Place<P, DP>::STRIDE);
    P::template multiply<false>(dq, a, b[0]);
  }
  const int g = lane_id() >> 2, t = lane_id() & 3;
  const uint32_t to = shared_address(place.query) + (block * 16 + g) * ROW + (column * 8 + 2 * t) * SIZE;
  P::store(to, dq[0] * scale, dq[1] * scale), P::store(to + 8 * ROW, dq[2] * scale, dq[3] * scale);
}

template <class P, int DP>
__device__ __forceinline__ void backward_unit(
    const Backward<typename P::Element>& given, const Place<P, DP>& place, const Unit& unit, int member, float* partial,
    bool more) {
  using T = typename P::Element;
  using Here = Place<P, DP>;
  constexpr int STRIDE = Here::STRIDE, ROW = Here::ROW, SIZE = sizeof(T), COLUMNS = DP / 8;
  const Groups& groups = given.groups;
  const int rows = groups.rows, team = groups.team, lane = lane_id(), index = threadIdx.x % (32 * team);
  find_tokens(groups, unit, place.pixels, place.masks, index, 32 * team);
  __syncthreads();
#pragma unroll 1
  for (int i = 0; i < 4; i++) {
    const Map<const T> map = (i == 0 ? given.query : i == 1 ? given.key : i == 2 ? given.value : given.grad).of(unit);
    const int channels = i < 2 ? given.channels : given.value_channels;
    load_rows<T, DP>(place.query + i * rows * STRIDE, STRIDE, map, channels, place.pixels, rows, index, 32 * team);
  }
  wait_copies<0>();
  __syncthreads();

  const bool scaled = given.bias.head >= 0 || given.scale2 <= 0;  // before the maximum is looked for
  const float factor = scaled ? 1.0f : given.scale2;
  for (int tile = member; tile * 16 < rows; tile += team) find_rows<P, DP>(given, place, unit, tile, scaled, factor);
  __syncthreads();

  float dk[2][COLUMNS][4], dv[2][COLUMNS][4];
#pragma unroll
  for (int i = 0; i < 8 * COLUMNS; i++) {
    dk[i / 4 / COLUMNS][i / 4 % COLUMNS][i % 4] = dv[i / 4 / COLUMNS][i / 4 % COLUMNS][i % 4] = 0.0f;
  }
  const int first = 2 * member, count = min(rows / 16 - first, 2);
#pragma unroll 1
  for (int block = 0; block < rows / 16; block++) {
    if (count > 0) add_queries<P, DP>(dk, dv, given, place, unit, first, count, block, scaled, factor, partial, more);
    __syncthreads();
    for (int n = member; n < COLUMNS; n += team) finish_queries<P, DP>(place, rows, block, n, given.scale);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int m = i / 2, half = i % 2;
    if (m < count) {
      const uint32_t at = ((first + m) * 16 + 8 * half + lane / 4) * ROW + 2 * (lane & 3) * SIZE;
#pragma unroll
      for (int n = 0; n < COLUMNS; n++) {
        const uint32_t to = at + n * 8 * SIZE;
        P::store(
            shared_address(place.key) + to, dk[m][n][2 * half] * given.scale, dk[m][n][2 * half + 1] * given.scale);
        P::store(shared_address(place.value) + to, dv[m][n][2 * half], dv[m][n][2 * half + 1]);
      }
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = 0; i < 3; i++) {
    const Map<T> map = (i == 0 ? given.query_grad : i == 1 ? given.key_grad : given.value_grad).of(unit);
    const int channels = i < 2 ? given.channels : given.value_channels;
    store_rows<T, DP>(place.query + i * rows * STRIDE, STRIDE, map, channels, place.pixels, rows, index, 32 * team);
  }
}

template <class P, int DP>
__device__ __forceinline__ void backward(const Backward<typename P::Element>& given, unsigned char* shared, int warps) {
  const Groups& groups = given.groups;
  const int warp = threadIdx.x >> 5, units = warps / groups.team, mine = warp / groups.team;
  const Place<P, DP> place(shared, units, mine, groups.rows);
  const bool sums = given.steps > 0;
  const int head = blockIdx.x % groups.heads, part = blockIdx.x / groups.heads * units + mine;
  float* partial = nullptr;
  if (sums) {
    const int64_t area = static_cast<int64_t>(given.bias.tokens) * given.bias.tokens;
    partial = given.partial + (static_cast<int64_t>(part) * groups.heads + head) * area;
  }
  int step = 0;
  do {
    int index = blockIdx.x * units + mine;
    if (sums) {
      const int item = part * given.steps + step;
      index = item < given.items ? item * groups.heads + head : groups.units;
    }
    backward_unit<P, DP>(given, place, unit_of(groups, index), warp % groups.team, partial, step > 0);
    step++;
    __syncthreads();  // the next unit comes to the place of this one
  } while (step < given.steps);
}

}  // namespace mvk::attention
