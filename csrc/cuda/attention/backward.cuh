// Softmax attention inside groups of pixels, backward.
//
// With P the probabilities, dP = dout V^T and delta the row sums of P dP: dV = P^T dout, dS = P (dP - delta),
// dQ = scale dS K, dK = scale dS^T Q. A team of warps has one unit, whose q, k, v and dout it brings to shared memory,
// once. Two passes over the scores follow.
//
// Queries: each warp takes 16 at a time, goes over the keys with a running maximum, and leaves the maximum, 1 / sum and
// delta of each row. Keys: each warp owns 16 or 32, whose dK and dV are in its registers while it goes over the queries, 16 at a
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

  // Whether scores are scaled before the maximum is looked for, and by what they are multiplied after it.
  __device__ __forceinline__ bool scaled() const { return bias.head >= 0 || scale2 <= 0; }
  __device__ __forceinline__ float factor() const { return scaled() ? 1.0f : scale2; }
};

// A unit in shared memory.
template <class P, int DP>
struct Place {
  using T = typename P::Element;
  static constexpr int STRIDE = P::stride(DP), ROW = STRIDE * sizeof(T), PAIRS = P::TOKENS * sizeof(T);
  T *query, *key, *value, *grad;
  T* pairs;                    // twice: rows of keys, of which each has 16 queries
  float *top, *share, *delta;  // of rows; share is its logarithm
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

// What is known of the rows of 16 queries: their highest score, the logarithm of 1 / the sum of
// 2^(score - highest), and delta.
template <class P, int DP, bool PLAIN>
__device__ __forceinline__ void find_rows(
    const Backward<typename P::Element>& given, const Place<P, DP>& place, const Unit& unit, int tile) {
  constexpr int ROW = Place<P, DP>::ROW, AT_ONCE = PLAIN && DP <= 48 ? 4 : 2;
  const int lane = lane_id(), rows = given.groups.rows;
  const bool scaled = !PLAIN && given.scaled();
  const float factor = PLAIN ? given.scale2 : given.factor();
  const Lanes<P, DP> lanes;
  Channels<P, DP> q, g;
  q.load(shared_address(place.query) + tile * 16 * ROW, lanes);
  g.load(shared_address(place.grad) + tile * 16 * ROW, lanes);
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f}, delta[2] = {0.0f, 0.0f};
#pragma unroll 1
  for (int first = 0; first * 16 < rows; first += AT_ONCE) {
    const int count = rows / 16 - first;
    float s[AT_ONCE][2][4], highest[2] = {top[0], top[1]};
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      if (j >= count) continue;
      q.template multiply<false>(s[j], shared_address(place.key) + (first + j) * 16 * ROW, lanes);
      if (scaled) given.bias.template scale<false>(s[j], given.scale2, unit.head, tile * 16, (first + j) * 16);
      if (!PLAIN && !unit.full) mask_columns(s[j], place.masks[first + j], -INFINITY);
#pragma unroll
      for (int i = 0; i < 8; i++) highest[i / 2 % 2] = fmaxf(highest[i / 2 % 2], s[j][i / 4][i % 4]);
    }
    float used[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      highest[r] = fmaxf(highest[r], __shfl_xor_sync(~0u, highest[r], 1));
      highest[r] = fmaxf(highest[r], __shfl_xor_sync(~0u, highest[r], 2));
      used[r] = highest[r] == -INFINITY ? 0.0f : highest[r];
      const float shrink = exp2_fast((top[r] - used[r]) * factor);
      total[r] *= shrink, delta[r] *= shrink;
      top[r] = highest[r];
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      if (j >= count) continue;
      float dp[2][4];
      g.template multiply<false>(dp, shared_address(place.value) + (first + j) * 16 * ROW, lanes);
      if (!PLAIN && !unit.full) mask_columns(dp, place.masks[first + j], 0.0f);
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
      const float share = reciprocal_fast(total[r]);
      place.top[row] = top[r] == -INFINITY ? 0.0f : top[r];
      place.share[row] = log2_fast(share), place.delta[row] = delta[r] * share;
    }
  }
}

// dK and dV of TILES times 16 keys, of which `count` times 16 exist, from 16 queries; dS of these is left in place.pairs.
template <class P, int DP, bool PLAIN, int TILES>
__device__ __forceinline__ void add_queries(
    float (&dk)[TILES][DP / 8][4], float (&dv)[TILES][DP / 8][4], const Backward<typename P::Element>& given,
    const Place<P, DP>& place, const Unit& unit, int first, int count, int block, int part, bool more) {
  constexpr int ROW = Place<P, DP>::ROW, PAIRS = Place<P, DP>::PAIRS;
  const int lane = lane_id(), query = block * 16 + 2 * (lane & 3);
  const Lanes<P, DP> lanes;
  const bool special = !PLAIN && (!unit.full || given.steps > 0);
  const bool scaled = !PLAIN && given.scaled();
  const float factor = PLAIN ? given.scale2 : given.factor();
  const uint32_t q = shared_address(place.query) + block * 16 * ROW;
  const uint32_t g = shared_address(place.grad) + block * 16 * ROW;

#pragma unroll
  for (int m = 0; m < TILES; m++) {
    // Beyond the last key of all lies the next tile: what is computed of it goes nowhere.
    float p[2][4], ds[2][4];
    multiply_turned<P, DP>(p, shared_address(place.key) + (first + m) * 16 * ROW, q, lanes);
    if (scaled) given.bias.template scale<true>(p, given.scale2, unit.head, block * 16, (first + m) * 16);
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const float2 top = *reinterpret_cast<const float2*>(place.top + query + 8 * n);
      const float2 share = *reinterpret_cast<const float2*>(place.share + query + 8 * n);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        p[n][i] = exp2_fast(fmaf(p[n][i] - (i % 2 ? top.y : top.x), factor, i % 2 ? share.y : share.x));
      }
    }
    multiply_turned<P, DP>(ds, shared_address(place.value) + (first + m) * 16 * ROW, g, lanes);
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const float2 delta = *reinterpret_cast<const float2*>(place.delta + query + 8 * n);
#pragma unroll
      for (int i = 0; i < 4; i++) ds[n][i] = p[n][i] * (ds[n][i] - (i % 2 ? delta.y : delta.x));
    }
    if (special) {
      const uint32_t keys = m == 0 || m < count ? place.masks[first + m] >> (lane >> 2) : 0;
      const uint32_t queries = place.masks[block] >> 2 * (lane & 3);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const bool there = keys >> (i / 2 % 2 * 8) & queries >> (i / 4 * 8 + i % 2) & 1;
        if (!there) p[i / 4][i % 4] = ds[i / 4][i % 4] = 0.0f;
      }
      if (given.steps > 0) {
        const int tokens = given.bias.tokens, key = (first + m) * 16 + (lane >> 2);
        float* sums = given.partial + static_cast<int64_t>(part) * tokens * tokens;
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const int at_query = query + i / 4 * 8 + i % 2, at_key = key + i / 2 % 2 * 8;
          if (at_query < tokens && at_key < tokens) {
            float* sum = sums + at_query * tokens + at_key;
            *sum = ds[i / 4][i % 4] + (more ? *sum : 0.0f);
          }
        }
      }
    }
    typename P::template Left<16> left, left_ds;
    P::from_sums(left, p[0], p[1]);
    P::from_sums(left_ds, ds[0], ds[1]);
    if (m == 0 || m < count) {
      const uint32_t pairs = shared_address(place.pairs) + (block & 1) * given.groups.rows * PAIRS;
      P::store_tokens(pairs + (first + m) * 16 * PAIRS, left_ds, ds[0], ds[1]);
    }
    add_tokens<P, DP>(dv[m], left, g, lanes);
    add_tokens<P, DP>(dk[m], left_ds, q, lanes);
  }
}

// Eight columns of dQ of 16 queries, to the queries' place.
template <class P, int DP>
__device__ __forceinline__ void finish_queries(
    const Place<P, DP>& place, int rows, int block, int column, float scale) {
  constexpr int ROW = Place<P, DP>::ROW, PAIRS = Place<P, DP>::PAIRS, SIZE = sizeof(typename P::Element);
  const uint32_t pairs = shared_address(place.pairs) + (block & 1) * rows * PAIRS;
  const uint32_t keys = shared_address(place.key) + column * 8 * SIZE;
  const Lanes<P, DP> lanes;
  float dq[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
  for (int j = 0; j < rows / 16; j++) {
    typename P::template Left<16> a;
    typename P::template Right<16> b[1];
    P::load_transposed(a, pairs + j * 16 * PAIRS, P::TOKENS);
    P::load_tokens(b, keys + j * 16 * ROW, lanes);
    P::template multiply<false>(dq, a, b[0]);
  }
  const int g = lane_id() >> 2, t = lane_id() & 3;
  const uint32_t to = shared_address(place.query) + (block * 16 + g) * ROW + (column * 8 + 2 * t) * SIZE;
  P::store(to, dq[0] * scale, dq[1] * scale), P::store(to + 8 * ROW, dq[2] * scale, dq[3] * scale);
}

// What a thread does. It is found anew for each phase, from its index, which the compiler is told may have changed: the
// products need the registers that would keep it.
template <class P, int DP, bool PLAIN, int WARPS>
struct Work {
  Place<P, DP> place;
  Unit unit;
  int member, index, lanes;  // of the team
  int part;                  // where in given.partial its sums of dS are

  __device__ __forceinline__ Work(const Backward<typename P::Element>& given, unsigned char* shared, int step)
      : place(shared, 0, 0, 0) {
    const Groups& groups = given.groups;
    int thread, block;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    const int warp = thread >> 5, units = WARPS >> groups.team_bits, mine = warp >> groups.team_bits;
    lanes = 32 << groups.team_bits, index = thread & (lanes - 1), member = index >> 5;
    place = Place<P, DP>(shared, units, mine, groups.rows);
    part = 0;
    int which = block * units + mine;
    if (given.steps > 0) {
      const int head = block % groups.heads, turns = block / groups.heads * units + mine;
      part = turns * groups.heads + head;
      const int item = turns * given.steps + step;
      which = item < given.items ? item * groups.heads + head : groups.units;
    }
    unit = unit_of(groups, PLAIN ? min(which, groups.units - 1) : which);
    unit.exists = which < groups.units;
  }
};

template <class P, int DP, bool PLAIN, int WARPS>
__device__ __forceinline__ void load_unit(const Backward<typename P::Element>& given, unsigned char* shared, int step) {
  using T = typename P::Element;
  const Work<P, DP, PLAIN, WARPS> work(given, shared, step);
  const int rows = given.groups.rows;
  Unit unit = work.unit;
  unit.exists |= PLAIN;  // its rows are those of another, and are not stored
  find_tokens(given.groups, unit, work.place.pixels, work.place.masks, work.index, work.lanes);
  __syncthreads();
#pragma unroll 1
  for (int i = 0; i < 4; i++) {
    const Map<const T> map = (i == 0   ? given.query
                              : i == 1 ? given.key
                              : i == 2 ? given.value
                                       : given.grad)
                                 .of(work.unit);
    load_unit_rows<T, DP, P::stride(DP), PLAIN>(
        work.place.query + i * rows * P::stride(DP), map, i < 2 ? given.channels : given.value_channels,
        work.place.pixels, rows, work.member, work.lanes / 32);
  }
  wait_copies<0>();
  __syncthreads();
}

template <class P, int DP, bool PLAIN, int WARPS>
__device__ __forceinline__ void store_unit(
    const Backward<typename P::Element>& given, unsigned char* shared, int step) {
  using T = typename P::Element;
  const Work<P, DP, PLAIN, WARPS> work(given, shared, step);
  const int rows = given.groups.rows;
  if (PLAIN && !work.unit.exists) return;
#pragma unroll 1
  for (int i = 0; i < 3; i++) {
    const Map<T> map = (i == 0 ? given.query_grad : i == 1 ? given.key_grad : given.value_grad).of(work.unit);
    store_unit_rows<T, DP, P::stride(DP), PLAIN>(
        work.place.query + i * rows * P::stride(DP), map, i < 2 ? given.channels : given.value_channels,
        work.place.pixels, rows, work.member, work.lanes / 32);
  }
}

template <class P, int DP, bool PLAIN, int TILES, int WARPS>
__device__ __forceinline__ void pass_over_keys(
    const Backward<typename P::Element>& given, unsigned char* shared, int step) {
  constexpr int ROW = Place<P, DP>::ROW, SIZE = sizeof(typename P::Element), COLUMNS = DP / 8;
  const Work<P, DP, PLAIN, WARPS> work(given, shared, step);
  const Place<P, DP>& place = work.place;
  const int rows = given.groups.rows, lane = lane_id();
  float dk[TILES][COLUMNS][4], dv[TILES][COLUMNS][4];
#pragma unroll
  for (int i = 0; i < 4 * TILES * COLUMNS; i++) {
    dk[i / 4 / COLUMNS][i / 4 % COLUMNS][i % 4] = dv[i / 4 / COLUMNS][i / 4 % COLUMNS][i % 4] = 0.0f;
  }
  const int first = TILES * work.member, count = min(rows / 16 - first, TILES);
#pragma unroll 1
  for (int block = 0; block < rows / 16; block++) {
    if (count > 0) {
      add_queries<P, DP, PLAIN, TILES>(dk, dv, given, place, work.unit, first, count, block, work.part, step > 0);
    }
    __syncthreads();
    for (int n = work.member; n < COLUMNS; n += work.lanes / 32) {
      finish_queries<P, DP>(place, rows, block, n, given.scale);
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2 * TILES; i++) {
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
}

// A block has WARPS warps, of which each owns TILES times 16 keys.
// PLAIN: every unit has a token in each row, there is no bias, and the scale is above 0.
template <class P, int DP, bool PLAIN, int TILES, int WARPS>
__device__ __forceinline__ void backward(const Backward<typename P::Element>& given, unsigned char* shared) {
  const int steps = PLAIN ? 0 : given.steps;
  int step = 0;
  do {
    load_unit<P, DP, PLAIN, WARPS>(given, shared, step);
    {
      const Work<P, DP, PLAIN, WARPS> work(given, shared, step);
      for (int tile = work.member; tile * 16 < given.groups.rows; tile += work.lanes / 32) {
        find_rows<P, DP, PLAIN>(given, work.place, work.unit, tile);
      }
    }
    __syncthreads();
    pass_over_keys<P, DP, PLAIN, TILES, WARPS>(given, shared, step);
    store_unit<P, DP, PLAIN, WARPS>(given, shared, step);
    step++;
    if (step < steps) __syncthreads();  // the next unit comes to the place of this one
  } while (step < steps);
}

}  // namespace mvk::attention
