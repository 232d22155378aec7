// Softmax attention inside groups of pixels, backward: what backward_whole.cuh does not take.
//
// With P the probabilities, dP = dout V^T and delta the row sums of P dP: dV = P^T dout, dS = P (dP - delta),
// dQ = scale dS K, dK = scale dS^T Q. A team of warps has one unit, whose q, k, v and dout it brings to shared memory,
// once. Two passes over the scores follow.
//
// Queries: each warp takes 16 at a time, goes over the keys with a running maximum, and leaves the maximum, 1 / sum and
// delta of each row. Keys: each warp owns 16 or 32, whose dK and dV are in its registers while it goes over the
// queries, 16 at a time. Rows of its tiles are keys, so P and dS become left operands where they are. dS goes to shared
// memory as well, by way of which the team finishes dQ of these queries. Each gradient then leaves by way of the place
// of its input, in whole rows, and is stored once.
//
// P is made of the same bits in both passes: delta of a row whose P is 1 somewhere is that key's dP, and dS is 0.
#pragma once

#include "backward_rows.cuh"

namespace mvk::attention {

// The keys of a warp as operands, where there are registers for them.
template <class P, int DP, bool PLAIN, int TILES>
struct Own {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  static constexpr int MOST = 32;
#else
  static constexpr int MOST = PLAIN ? 40 : 32;
#endif
  static constexpr bool KEPT = P::HALF && DP <= MOST;
  Channels<P, KEPT ? DP : 8> key[TILES], value[TILES];

  __device__ __forceinline__ Own(const Place<P, DP>& place, int first, const Lanes<P, DP>& lanes) {
    if constexpr (KEPT) {
#pragma unroll
      for (int m = 0; m < TILES; m++) {
        key[m].load(shared_address(place.key) + (first + m) * 16 * Place<P, DP>::ROW, lanes);
        value[m].load(shared_address(place.value) + (first + m) * 16 * Place<P, DP>::ROW, lanes);
      }
    }
  }
};

__device__ __forceinline__ float4 added(const float (&x)[4], const float4& y) {
  return {x[0] + y.x, x[1] + y.y, x[2] + y.z, x[3] + y.w};
}

// dK and dV of TILES times 16 keys, of which `count` times 16 exist, from 16 queries; dS of these is left in
// place.pairs, in columns from 16 `column` on. What is read of the queries serves all of these keys, in float32 16 of
// them: their operands, each in two parts, leave no registers for more.
template <class P, int DP, bool PLAIN, int TILES>
__device__ __forceinline__ void add_queries(
    float (&dk)[TILES][DP / 8][4], float (&dv)[TILES][DP / 8][4], const Own<P, DP, PLAIN, TILES>& own,
    const Backward<typename P::Element>& given, const Place<P, DP>& place, const Unit& unit, int first, int count,
    int block, int column, int64_t part, bool more, const Lanes<P, DP>& lanes) {
  constexpr int ROW = Place<P, DP>::ROW, SIZE = sizeof(typename P::Element);
  constexpr int EACH = P::HALF ? TILES : 1;
  const int lane = lane_id(), query = 2 * (lane & 3);
  const bool special = !PLAIN && (!unit.full || given.steps > 0);
  const bool biased = !PLAIN && given.scores.bias.exists();
  const float factor = PLAIN ? given.scores.scale2 : given.scores.factor();
  const uint32_t q = shared_address(place.query) + block * 16 * ROW;
  const uint32_t g = shared_address(place.grad) + block * 16 * ROW;
  const float* const found = place.found + block * Place<P, DP>::FOUND + query;

#pragma unroll
  for (int start = 0; start < TILES; start += EACH) {
    // Beyond the last key of all lies the next tile: what is computed of it goes nowhere.
    float p[EACH][2][4], ds[EACH][2][4];
    if constexpr (Own<P, DP, PLAIN, TILES>::KEPT) {
      multiply_all<P, DP>(p, own.key, q, lanes);
    } else {
      multiply_turned<P, DP>(p, shared_address(place.key) + (first + start) * 16 * ROW, q, lanes);
    }
    if (biased) {
#pragma unroll
      for (int m = 0; m < EACH; m++) {
        // Beyond the last key of all there is no tile.
        const int tile = start + m < count ? first + start + m : first;
        const typename P::Element* const row = given.scores.bias.template row<true>(unit.head, tile);
        OrderedBias<typename P::Element>::add(p[m], given.scores.scale, row + block * 256);
      }
    } else if (!PLAIN && given.scores.scale2 <= 0) {
#pragma unroll
      for (int i = 0; i < 8 * EACH; i++) p[i / 8][i / 4 % 2][i % 4] *= given.scores.scale;
    }
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const float2 top = *reinterpret_cast<const float2*>(found + 8 * n);
      const float2 share = *reinterpret_cast<const float2*>(found + 16 + 8 * n);
#pragma unroll
      for (int i = 0; i < 4 * EACH; i++) {
        float& x = p[i / 4][n][i % 4];
        x = exp2_fast(fmaf(x - (i % 2 ? top.y : top.x), factor, i % 2 ? share.y : share.x));
      }
    }
    if constexpr (Own<P, DP, PLAIN, TILES>::KEPT) {
      multiply_all<P, DP>(ds, own.value, g, lanes);
    } else {
      multiply_turned<P, DP>(ds, shared_address(place.value) + (first + start) * 16 * ROW, g, lanes);
    }
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const float2 delta = *reinterpret_cast<const float2*>(found + 32 + 8 * n);
#pragma unroll
      for (int i = 0; i < 4 * EACH; i++) {
        ds[i / 4][n][i % 4] = p[i / 4][n][i % 4] * (ds[i / 4][n][i % 4] - (i % 2 ? delta.y : delta.x));
      }
    }
    if (special) {
      const uint32_t queries = place.masks[block];
#pragma unroll
      for (int m = 0; m < EACH; m++) {
        const int tile = first + start + m;
        const bool exists = start + m == 0 || start + m < count;
        const uint32_t keys = exists ? place.masks[tile] : 0;
        if ((keys & queries) != 0xffff) {
#pragma unroll
          for (int i = 0; i < 8; i++) {
            const bool there = keys >> (lane >> 2) >> (i / 2 % 2 * 8) & queries >> query >> (i / 4 * 8 + i % 2) & 1;
            if (!there) p[m][i / 4][i % 4] = ds[m][i / 4][i % 4] = 0.0f;
          }
        }
        if (given.steps > 0 && exists) {
          const int tiles = given.groups.rows / 16, at = (block * tiles + tile) * 64 + lane;
#pragma unroll
          for (int n = 0; n < 2; n++) {
            const float (&x)[4] = ds[m][n];
            if (given.held) {
              place.sums[at + n * 32] = added(x, more ? place.sums[at + n * 32] : float4{});
            } else {
              float4* const sums = reinterpret_cast<float4*>(given.partial) + part * (tiles * tiles * 64);
              sums[at + n * 32] = added(x, more ? sums[at + n * 32] : float4{});
            }
          }
        }
      }
    }
    typename P::template Left<16> left[EACH], left_ds[EACH];
#pragma unroll
    for (int m = 0; m < EACH; m++) {
      P::from_sums(left[m], p[m][0], p[m][1]);
      P::from_sums(left_ds[m], ds[m][0], ds[m][1]);
      if (start + m == 0 || start + m < count) {
        const uint32_t pairs = shared_address(place.pairs) + ((first + start + m) * place.stride + column) * 16 * SIZE;
        P::store_tokens(pairs, place.stride, left_ds[m], ds[m][0], ds[m][1]);
      }
    }
    add_tokens<P, DP / 8>(reinterpret_cast<float (&)[EACH][DP / 8][4]>(dv[start]), left, g, lanes);
    add_tokens<P, DP / 8>(reinterpret_cast<float (&)[EACH][DP / 8][4]>(dk[start]), left_ds, q, lanes);
  }
}

// dQ of 16 queries, whose dS has the columns from 16 `column` on, to their place: COLUMNS times eight channels, from
// eight times `from` on.
template <class P, int DP, int COLUMNS>
__device__ __forceinline__ void finish_queries(
    const Place<P, DP>& place, int rows, int block, int column, int from, float scale) {
  constexpr int ROW = Place<P, DP>::ROW, SIZE = sizeof(typename P::Element);
  uint32_t pairs = shared_address(place.pairs) + column * 16 * SIZE;
  uint32_t keys = shared_address(place.key) + from * 8 * SIZE;
  const Lanes<P, DP> lanes;
  constexpr int AHEAD = P::HALF && DP > 40 ? 1 : 2;  // as registers allow
  float dq[COLUMNS][4];
#pragma unroll
  for (int i = 0; i < 4 * COLUMNS; i++) dq[i / 4][i % 4] = 0.0f;
#pragma unroll AHEAD
  for (int j = 0; j < rows / 16; j++, pairs += 16 * place.stride * SIZE, keys += 16 * ROW) {
    typename P::template Left<16> a;
    P::load_transposed(a, pairs, place.stride);
    add_tokens<P, COLUMNS>(dq, a, keys, lanes);
  }
  const int g = lane_id() >> 2, t = lane_id() & 3;
  const uint32_t to = shared_address(place.query) + (block * 16 + g) * ROW + (from * 8 + 2 * t) * SIZE;
#pragma unroll
  for (int n = 0; n < COLUMNS; n++) {
    P::store(to + 8 * n * SIZE, dq[n][0] * scale, dq[n][1] * scale);
    P::store(to + 8 * n * SIZE + 8 * ROW, dq[n][2] * scale, dq[n][3] * scale);
  }
}

// What a thread does. It is found anew for each phase, from its index, which the compiler is told may have changed: the
// products need the registers that would keep it. What takes divisions is kept in shared memory.
template <class P, int DP, bool PLAIN, int WARPS>
struct Work {
  Place<P, DP> place;
  int member, index, lanes;  // of the team

  __device__ __forceinline__ Work(const Backward<typename P::Element>& given, unsigned char* shared)
      : place(shared, 0, 0, 0, 0, 0) {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    const int warp = thread >> 5, units = WARPS >> given.groups.team_bits, mine = warp >> given.groups.team_bits;
    lanes = 32 << given.groups.team_bits, index = thread & (lanes - 1), member = index >> 5;
    place = Place<P, DP>(shared, units, mine, given.groups.rows, given.queries, given.held);
  }
  __device__ __forceinline__ Kept find(const Backward<typename P::Element>& given, int step) const {
    const Groups& groups = given.groups;
    const int block = blockIdx.x, units = WARPS >> groups.team_bits, mine = threadIdx.x >> (5 + groups.team_bits);
    Kept found;
    found.part = 0;
    int which = block * units + mine;
    if (!PLAIN && given.steps > 0) {
      const int head = block % groups.heads, turns = block / groups.heads * units + mine;
      found.part = turns * groups.heads + head;
      const int item = turns * given.steps + step;
      which = item < given.items ? item * groups.heads + head : groups.units;
    }
    // In a plain kernel a team beyond the last unit has that unit again, and stores nothing.
    found.unit = unit_of(groups, PLAIN ? min(which, groups.units - 1) : which);
    found.unit.exists = which < groups.units;
    return found;
  }
};

template <class P, int DP, bool PLAIN, int WARPS>
__device__ __forceinline__ void load_unit(const Backward<typename P::Element>& given, unsigned char* shared, int step) {
  using T = typename P::Element;
  const Work<P, DP, PLAIN, WARPS> work(given, shared);
  const int rows = given.groups.rows;
  const Kept kept = work.find(given, step);
  if (work.index == 0) *work.place.kept = kept;
  Unit unit = kept.unit;
  unit.exists |= PLAIN;
  find_tokens(given.groups, unit, work.place.pixels, work.place.masks, work.index, work.lanes);
  __syncthreads();
#pragma unroll 1
  for (int i = 0; i < 4; i++) {
    const Map<const T> map = (i == 0 ? given.query : i == 1 ? given.key : i == 2 ? given.value : given.grad).of(unit);
    load_unit_rows<T, DP, P::stride(DP), PLAIN>(
        work.place.query + i * rows * P::stride(DP), map, i < 2 ? given.channels : given.value_channels,
        work.place.pixels, rows, work.member, work.lanes / 32);
  }
  wait_copies<0>();
  __syncthreads();
}

template <class P, int DP, bool PLAIN, int WARPS>
__device__ __forceinline__ void store_unit(const Backward<typename P::Element>& given, unsigned char* shared) {
  using T = typename P::Element;
  const Work<P, DP, PLAIN, WARPS> work(given, shared);
  const int rows = given.groups.rows;
  const Unit unit = work.place.kept->unit;
  if (PLAIN && !unit.exists) return;
#pragma unroll 1
  for (int i = 0; i < 3; i++) {
    const Map<T> map = (i == 0 ? given.query_grad : i == 1 ? given.key_grad : given.value_grad).of(unit);
    store_unit_rows<T, DP, P::stride(DP), PLAIN>(
        work.place.query + i * rows * P::stride(DP), map, i < 2 ? given.channels : given.value_channels,
        work.place.pixels, rows, work.member, work.lanes / 32);
  }
}

template <class P, int DP, bool PLAIN, int TILES, int WARPS>
__device__ __forceinline__ void pass_over_keys(
    const Backward<typename P::Element>& given, unsigned char* shared, int step) {
  constexpr int ROW = Place<P, DP>::ROW, SIZE = sizeof(typename P::Element), COLUMNS = DP / 8;
  const Work<P, DP, PLAIN, WARPS> work(given, shared);
  const Place<P, DP>& place = work.place;
  const int rows = given.groups.rows, lane = lane_id();
  float dk[TILES][COLUMNS][4], dv[TILES][COLUMNS][4];
#pragma unroll
  for (int i = 0; i < 4 * TILES * COLUMNS; i++) {
    dk[i / 4 / COLUMNS][i / 4 % COLUMNS][i % 4] = dv[i / 4 / COLUMNS][i / 4 % COLUMNS][i % 4] = 0.0f;
  }
  const int first = TILES * work.member, count = min(rows / 16 - first, TILES);
#pragma unroll 1
  for (int begin = 0; begin < rows / 16; begin += given.queries / 16) {
    const int blocks = min(given.queries, rows) / 16 - max(0, begin + given.queries / 16 - rows / 16);
    if (begin > 0) __syncthreads();
    if (count > 0) {
      const Lanes<P, DP> lanes;
      const Own<P, DP, PLAIN, TILES> own(place, first, lanes);
#pragma unroll 1
      for (int i = 0; i < blocks; i++) {
        add_queries<P, DP, PLAIN, TILES>(
            dk, dv, own, given, place, place.kept->unit, first, count, begin + i, i, place.kept->part, step > 0, lanes);
      }
    }
    __syncthreads();
    // In float32 dS of few queries fits: a warp then has eight columns of them. Of many channels it has half.
    constexpr int JOBS = !P::HALF ? COLUMNS : DP < 48 ? 1 : 2;
    for (int job = work.member; job < blocks * JOBS; job += work.lanes / 32) {
      finish_queries<P, DP, COLUMNS / JOBS>(
          place, rows, begin + job / JOBS, job / JOBS, job % JOBS * (COLUMNS / JOBS), given.scores.scale);
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
            shared_address(place.key) + to, dk[m][n][2 * half] * given.scores.scale,
            dk[m][n][2 * half + 1] * given.scores.scale);
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
      const Work<P, DP, PLAIN, WARPS> work(given, shared);
      for (int tile = work.member; tile * 16 < given.groups.rows; tile += work.lanes / 32) {
        find_rows<P, DP, PLAIN>(given, work.place, work.place.kept->unit, tile);
      }
    }
    __syncthreads();
    pass_over_keys<P, DP, PLAIN, TILES, WARPS>(given, shared, step);
    store_unit<P, DP, PLAIN, WARPS>(given, shared);
    step++;
    if (step < steps) __syncthreads();  // the next unit comes to the place of this one
  } while (step < steps);
  if (!PLAIN && given.held) {
    // The sums of a block's teams become one.
    const Work<P, DP, PLAIN, WARPS> work(given, shared);
    const int size = given.groups.rows * given.groups.rows / 4, units = 32 * WARPS / work.lanes;
    const float4* const sums = work.place.sums - (threadIdx.x / work.lanes) * size;
    for (int i = threadIdx.x; i < size; i += 32 * WARPS) {
      float4 total = sums[i];
      for (int j = 1; j < units; j++) {
        const float4 x = sums[j * size + i];
        total = {total.x + x.x, total.y + x.y, total.z + x.z, total.w + x.w};
      }
      reinterpret_cast<float4*>(given.partial)[static_cast<int64_t>(blockIdx.x) * size + i] = total;
    }
  }
}

}  // namespace mvk::attention
