// Softmax attention inside groups of up to 144 pixels, backward, in half types: whole rows of scores in registers.
//
// A team has as many warps as its unit has tiles of 16 tokens. Each warp brings 16 rows of q, k, v and dout to shared
// memory, once, and then has 16 queries against all keys: their scores and dP are in its registers, so softmax, delta
// and dS need no other warp, and dS becomes the left operand of dQ where it is. P and dS go to shared memory, once, as
// half types. From there each warp takes the columns of 16 keys, for their dV and dK. That is five products and each
// exponential once; of more than 64 tokens dP is a sixth, computed again. Gradients leave in whole rows by way of the
// warp's own rows of k and v, which nobody needs by then.
//
// Sums of dS for the bias's gradient stay in shared memory from unit to unit. A lane always has the same elements, so
// no barrier guards them.
#pragma once

#include "whole_unit.cuh"

namespace mvk::attention {

// As WholeUnit, with what is computed.
template <class P, int DP, bool PLAIN, int TOKENS, int WARPS>
struct Whole : WholeUnit<P, DP, PLAIN, TOKENS, WARPS> {
  using Base = WholeUnit<P, DP, PLAIN, TOKENS, WARPS>;
  using T = typename P::Element;
  using Base::AGAIN, Base::COLUMNS, Base::EIGHTS, Base::HELD, Base::PAIRS, Base::ROW, Base::ROWS, Base::SIZE,
      Base::TILES, Base::UNITS;
  using Base::find, Base::forget, Base::load, Base::number_of, Base::number_own_tokens, Base::pack_sums, Base::placed,
      Base::put;
  using Base::GRAD, Base::KEY, Base::MASKS, Base::PIXELS, Base::QUERY, Base::DS, Base::STATE, Base::SUMS, Base::VALUE;
  using Base::PROBABILITIES, Base::at, Base::given, Base::lane, Base::member, Base::mine;
  using Base::store, Base::wait_for_team;
  using Base::WholeUnit;
  using Sums = typename Base::Sums;
  using Tiles = float[TILES][2][4];
  // Tiles of the bias that are read while the copies are under way.
  static constexpr int AHEAD = AGAIN ? 4 : TILES;
  using Bias = typename OrderedBias<T>::Words[AHEAD];

  // The products of the warp's 16 rows of a tile and all rows of another.
  __device__ __forceinline__ void multiply(Tiles& c, int left, int right, const Lanes<P, DP>& lanes) const {
    Channels<P, DP> a;
    a.load(at + left + member * 16 * ROW, lanes);
#pragma unroll
    for (int j = 0; j < TILES; j++) a.template multiply<false>(c[j], at + right + j * 16 * ROW, lanes);
  }

  __device__ __forceinline__ void load_bias(Bias& to, const Unit& unit) const {
    // Of what has no value on some path the compiler keeps the value of the step before.
#pragma unroll
    for (int j = 0; j < AHEAD; j++) to[j] = {};
    if (PLAIN || !given.scores.bias.exists()) return;
    const T* const row = given.scores.bias.template row<false>(unit.head, member);
#pragma unroll
    for (int j = 0; j < AHEAD; j++) OrderedBias<T>::load(to[j], row + j * 256);
  }
  // Which of 16 tokens exist.
  __device__ __forceinline__ uint32_t mask_of(const Unit& unit, int tile) const {
    if (unit.cut) return __float_as_uint(load_shared(at + MASKS + 4 * tile));
    return (1u << min(max(given.tokens - 16 * tile, 0), 16)) - 1;
  }
  __device__ __forceinline__ void find_own_mask(const Unit& unit) const {
    if (PLAIN || !unit.cut) return;
    const int place = __float_as_int(load_shared(at + PIXELS + 4 * (member * 16 + (lane & 15))));
    const uint32_t there = __ballot_sync(~0u, placed(unit, place) >= 0) & 0xffff;
    if (lane == 0) store_shared(at + MASKS + 4 * member, there);
  }

  // Of 16 queries and 16 keys: P and dS from weights and dP, to shared memory; dS also as left operand, and to the
  // sums.
  __device__ __forceinline__ void finish(
      typename P::template Left<16>& left, float (&p)[2][4], float (&ds)[2][4], const float (&share)[2],
      const float (&delta)[2], int tile, const bool (&there)[2], const Unit& unit) const {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float &x = p[i / 4][i % 4], &dx = ds[i / 4][i % 4];
      if (2 * tile + i / 4 < EIGHTS) {
        x *= share[i / 2 % 2];
        dx = x * (dx - delta[i / 2 % 2]);
        if (!PLAIN && AGAIN && !there[i / 2 % 2]) dx = 0.0f;
      } else {
        x = dx = 0.0f;
      }
    }
    // Of a row without weight dS is NaN, but not for the sums of keys that do not exist in this window.
    if (!PLAIN && unit.cut) mask_columns(ds, mask_of(unit, tile), 0.0f);
    if (!PLAIN) {
#pragma unroll
      for (int n = 0; n < 2; n++) {
        if (2 * tile + n >= EIGHTS) continue;
        const float (&x)[4] = ds[n];
        const uint32_t to = at + SUMS + (((member * TILES + tile) * 2 + n) * 32 + lane) * 16;
        float4 sum = {};
        load_shared_if(sum, to, given.held);
        store_shared_if(to, {x[0] + sum.x, x[1] + sum.y, x[2] + sum.z, x[3] + sum.w}, given.held);
      }
    }
    const uint32_t to = at + (member * 16 * PAIRS + tile * 16) * SIZE;
    typename P::template Left<16> weights;
    P::from_sums(weights, p[0], p[1]);
    P::from_sums(left, ds[0], ds[1]);
    P::store_tokens(to + PROBABILITIES, PAIRS, weights, p[0], p[1]);
    P::store_tokens(to + DS, PAIRS, left, ds[0], ds[1]);
  }
  __device__ __forceinline__ void clear_sums() const {
#pragma unroll 1
    for (int i = 0; i < 2 * TILES; i++) {
      store_shared_if(at + SUMS + ((member * 2 * TILES + i) * 32 + lane) * 16, float4{}, true);
    }
  }

  // P and dS of 16 queries, and their dQ, not yet scaled.
  __device__ __forceinline__ void score(Sums& dq, const Bias& bias, const Unit& unit, const Lanes<P, DP>& lanes) const {
    const float factor = PLAIN ? given.scores.scale2 : given.scores.factor();
    Tiles s;
    multiply(s, QUERY, KEY, lanes);
    if (!PLAIN && given.scores.bias.exists()) {
#pragma unroll
      for (int j = 0; j < AHEAD; j++) OrderedBias<T>::add(s[j], given.scores.scale, bias[j]);
      const T* const row = given.scores.bias.template row<false>(unit.head, member);
#pragma unroll
      for (int j = AHEAD; j < TILES; j++) OrderedBias<T>::add(s[j], given.scores.scale, row + j * 256);
    } else if (!PLAIN && given.scores.scaled()) {
#pragma unroll
      for (int i = 0; i < 4 * EIGHTS; i++) s[i / 8][i / 4 % 2][i % 4] *= given.scores.scale;
    }
    // A bias is -inf beyond the last token.
    if (!PLAIN && (given.scores.bias.exists() ? unit.cut : !unit.full)) {
#pragma unroll
      for (int j = 0; j < TILES; j++) mask_columns(s[j], mask_of(unit, j), -INFINITY);
    }
    float used[2] = {-INFINITY, -INFINITY}, total[2] = {}, delta[2] = {};
#pragma unroll
    for (int i = 0; i < 4 * EIGHTS; i++) used[i / 2 % 2] = fmaxf(used[i / 2 % 2], s[i / 8][i / 4 % 2][i % 4]);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      used[r] = max_of_row(used[r]);
      // A row of -inf alone must come out as NaN (0 / 0), without -inf - -inf on the way.
      if (!PLAIN && used[r] == -INFINITY) used[r] = 0.0f;
    }
    Tiles ds;
    Channels<P, DP> grad;
    grad.load(at + GRAD + member * 16 * ROW, lanes);
#pragma unroll
    for (int j = 0; j < TILES; j++) {
      if (AGAIN && j % 3 == 0) __syncwarp();  // fewer tiles at once
      grad.template multiply<false>(ds[j], at + VALUE + j * 16 * ROW, lanes);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        if (2 * j + i / 4 >= EIGHTS) continue;
        float& x = s[j][i / 4][i % 4];
        x = exp2_fast((x - used[i / 2 % 2]) * factor);
        total[i / 2 % 2] += x;
        delta[i / 2 % 2] = fmaf(x, ds[j][i / 4][i % 4], delta[i / 2 % 2]);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      total[r] = sum_of_row(total[r]), delta[r] = sum_of_row(delta[r]);
      total[r] = reciprocal_fast(total[r]);
      delta[r] *= total[r];
    }
    // What is computed of queries that do not exist may be NaN, and must not reach the keys.
    bool there[2] = {true, true};
    if (!PLAIN && !(unit.full && unit.exists)) {
      const uint32_t queries = unit.exists ? mask_of(unit, member) : 0;
#pragma unroll
      for (int r = 0; r < 2; r++) {
        there[r] = queries >> ((lane >> 2) + 8 * r) & 1;
        if (!there[r]) total[r] = delta[r] = 0.0f;
      }
      if (queries != 0xffff) {
#pragma unroll
        for (int i = 0; i < 8 * TILES; i++) {
          if (there[i / 2 % 2]) continue;
          s[i / 8][i / 4 % 2][i % 4] = 0.0f;
          if constexpr (!AGAIN) ds[i / 8][i / 4 % 2][i % 4] = 0.0f;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < TILES; j++) {
      if constexpr (AGAIN) {
        if (j % 3 == 0) __syncwarp();
        grad.template multiply<false>(ds[j], at + VALUE + j * 16 * ROW, lanes);
      }
      typename P::template Left<16> left;
      finish(left, s[j], ds[j], total, delta, j, there, unit);
      add(dq, left, at + KEY + j * 16 * ROW, 2 * j + 1 == EIGHTS, lanes);
    }
  }

  // c += A B, for 16 tokens, or the first eight of them, as columns of A.
  static __device__ __forceinline__ void add(
      Sums& c, const typename P::template Left<16>& a, uint32_t tile, bool half, const Lanes<P, DP>& lanes) {
#pragma unroll
    for (int n = 0; n < COLUMNS; n += 2) {
      typename P::template Right<16> b[2];
      if (n + 1 < COLUMNS) {
        P::load_tokens(b, tile + n * 8 * SIZE, lanes);
      } else {
        P::load_tokens(reinterpret_cast<typename P::template Right<16>(&)[1]>(b), tile + n * 8 * SIZE, lanes);
      }
#pragma unroll
      for (int i = 0; i < 2 && n + i < COLUMNS; i++) {
        if (half) {
          P::template multiply<false>(
              c[n + i], typename P::template Left<8>{a.of[0], a.of[1]}, typename P::template Right<8>{b[i].of[0]});
        } else {
          P::template multiply<false>(c[n + i], a, b[i]);
        }
      }
    }
  }

  // Of a unit, of which P and dS are in shared memory: dQ, which the registers have, and dK and dV, of the warp's 16
  // keys.
  __device__ __forceinline__ void finish_keys(
      uint32_t (&packed)[COLUMNS][2], const Unit& unit, const Lanes<P, DP>& lanes) const {
    put(VALUE, packed);
    store(VALUE, given.query_grad, unit, given.channels);
    Sums dk = {}, dv = {};
#pragma unroll
    for (int i = 0; i < TILES; i++) {
      const uint32_t column = at + (i * 16 * PAIRS + member * 16) * SIZE;
      typename P::template Left<16> a;
      P::load_transposed(a, column + PROBABILITIES, PAIRS);
      add(dv, a, at + GRAD + i * 16 * ROW, 2 * i + 1 == EIGHTS, lanes);
      P::load_transposed(a, column + DS, PAIRS);
      add(dk, a, at + QUERY + i * 16 * ROW, 2 * i + 1 == EIGHTS, lanes);
    }
    pack_sums(packed, dk, given.scores.scale);
    put(KEY, packed);
    store(KEY, given.key_grad, unit, given.channels);
    pack_sums(packed, dv, 1.0f);
    put(VALUE, packed);
    store(VALUE, given.value_grad, unit, given.value_channels);
  }

  // By way of memory, where registers have no room for what is wanted again: the compiler does not know that it is the
  // same. The last number is 0: added to lane and member it makes them, too, new to the compiler.
  __device__ __forceinline__ void leave_state(const Unit& unit, int step) const {
    const int state[7] = {static_cast<int>(unit.batch),
                          static_cast<int>(unit.head),
                          unit.y0,
                          unit.x0,
                          unit.exists | unit.cut << 1,
                          step,
                          0};
#pragma unroll
    for (int i = 0; i < 7; i++) store_shared(at + STATE + 4 * i, static_cast<uint32_t>(state[i]));
  }
  __device__ __forceinline__ void find_state(Unit& unit, int& step) {
    int state[7];
#pragma unroll
    for (int i = 0; i < 7; i++) state[i] = __float_as_int(load_shared(at + STATE + 4 * i));
    unit.batch = state[0], unit.head = state[1], unit.y0 = state[2], unit.x0 = state[3];
    unit.exists = state[4] & 1, unit.cut = state[4] & 2, step = state[5];
    lane += state[6], member += state[6];
  }

  __device__ __forceinline__ void run() {
    Lanes<P, DP> lanes;
    if constexpr (!AGAIN) lanes.keep();
    number_own_tokens();
    if (!PLAIN && given.held) clear_sums();
    int step = 0;
#pragma unroll 1
    do {
      forget();
      Unit unit = find(number_of(step));
      load(unit);
      Bias bias;
      load_bias(bias, unit);
      find_own_mask(unit);
      if (AGAIN && member == 0 && lane == 0) leave_state(unit, step);
      wait_copies<0>();
      wait_for_team();
      uint32_t packed[COLUMNS][2];
      {
        Sums dq = {};
        score(dq, bias, unit, lanes);
        pack_sums(packed, dq, given.scores.scale);
      }
      forget();
      wait_for_team();
      asm volatile("" : "+r"(step));  // or the compiler makes a version of all this for the first step
      if constexpr (AGAIN) find_state(unit, step);
      finish_keys(packed, unit, lanes);
      wait_for_team();  // the next unit comes to the place of this one
    } while (++step < (PLAIN ? 0 : given.steps));
    if (!PLAIN && given.held) leave_sums();
  }

  // The sums of a block's teams become one.
  __device__ __forceinline__ void leave_sums() const {
    __syncthreads();
    const uint32_t all = at - mine * (SUMS + HELD) + SUMS;
    float4* const to = reinterpret_cast<float4*>(given.partial) + static_cast<int64_t>(blockIdx.x) * (HELD / 16);
#pragma unroll 1
    for (int i = threadIdx.x; i < HELD / 16; i += 32 * WARPS) {
      float4 total;
      load_shared(total, all + i * 16);
#pragma unroll
      for (int j = 1; j < UNITS; j++) {
        float4 x;
        load_shared(x, all + j * (SUMS + HELD) + i * 16);
        total = {total.x + x.x, total.y + x.y, total.z + x.z, total.w + x.w};
      }
      to[i] = total;
    }
  }
};

}  // namespace mvk::attention
