// Softmax attention inside groups of 256 pixels, backward, in half types, without a bias: P and dS of 128 keys at a
// time.
//
// A block has one unit. Each of its 16 warps brings 16 rows of q, k, v and dout to shared memory, once, and then has 16
// queries against all keys: it computes their weights, once, so softmax and its correction need no other warp. What is
// subtracted from scores comes from the first keys; where later ones are so much higher that weights become large, the
// highest is searched for. Weights wait as half types, not yet divided by their sum: of the first half of the keys
// where P will be, of the second half in registers.
//
// Then, for each half of the keys, a warp computes dP of its queries again, and from it dS, which is the left operand
// of dQ where it is. P and dS go to shared memory; from there each warp sums dV or dK of 32 keys and half of the
// channels, over all queries. That is six products, and each exponential once. dV and dK replace values and keys, dQ
// at last the warp's queries, and gradients leave in whole rows.
#pragma once

#include "whole_unit.cuh"

namespace mvk::attention {

// As WholeUnit, with what is computed.
template <class P, int DP>
struct Parts : WholeUnit<P, DP, true, 256, 16, 128> {
  static constexpr int KEYS = 128;
  using Base = WholeUnit<P, DP, true, 256, 16, KEYS>;
  using T = typename P::Element;
  using Base::at, Base::given, Base::lane, Base::member;
  using Base::COLUMNS, Base::PAIRS, Base::ROW, Base::SIZE, Base::TILES;
  using Base::find, Base::load, Base::number_of, Base::number_own_tokens, Base::pack_sums, Base::put, Base::store;
  using Base::GRAD, Base::KEY, Base::QUERY, Base::DS, Base::VALUE, Base::PROBABILITIES;
  using Base::WholeUnit;
  using Sums = typename Base::Sums;
  static constexpr int PART = KEYS / 16;  // tiles of a half of the keys
  static constexpr int AT_ONCE = 4;       // tiles of keys, while weights are computed
  static constexpr int OWN = 2;           // tiles of keys of which a warp sums dV or dK
  using Some = typename P::template Left<16>[AT_ONCE];
  using Weights = typename P::template Left<16>[PART];

  // Where word i is that a lane has of a tile of P or dS, as left operand.
  __device__ __forceinline__ uint32_t word_of(int tile, int i) const {
    return at + ((member * 16 + (lane >> 2) + i % 2 * 8) * PAIRS + 2 * (lane & 3) + tile * 16 + i / 2 * 8) * SIZE;
  }

  // What a warp knows of its 16 queries; a lane of two of them.
  struct Rows {
    float top[2];    // what is subtracted from scores
    float total[2];  // of weights
    float delta[2];  // sums of weights times dP
  };

  // The highest score of each query.
  __device__ __forceinline__ void search(float (&top)[2]) const {
    const Lanes<P, DP> lanes;
    Channels<P, DP> query;
    query.load(at + QUERY + member * 16 * ROW, lanes);
    top[0] = top[1] = -INFINITY;
#pragma unroll 1
    for (int i = 0; i < TILES; i++) {
      float s[2][4];
      query.template multiply<false>(s, at + KEY + i * 16 * ROW, lanes);
      raise(top, s);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) top[r] = max_of_row(top[r]);
  }
  static __device__ __forceinline__ void raise(float (&top)[2], const float (&s)[2][4]) {
#pragma unroll
    for (int i = 0; i < 8; i++) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], s[i / 4][i % 4]);
  }

  // Weights of AT_ONCE times 16 keys, and their sums.
  __device__ __forceinline__ void weigh_some(
      Some& weights, Rows& rows, int first, bool known, const Channels<P, DP>& query, const Channels<P, DP>& grad,
      const Lanes<P, DP>& lanes) const {
    const uint32_t key = at + KEY + first * 16 * ROW, value = at + VALUE + first * 16 * ROW;
    float s[AT_ONCE][2][4];
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) query.template multiply<false>(s[j], key + j * 16 * ROW, lanes);
    if (first == 0 && !known) {
      rows.top[0] = rows.top[1] = -INFINITY;
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++) raise(rows.top, s[j]);
#pragma unroll
      for (int r = 0; r < 2; r++) rows.top[r] = max_of_row(rows.top[r]);
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      float dp[2][4];
      grad.template multiply<false>(dp, value + j * 16 * ROW, lanes);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        float& x = s[j][i / 4][i % 4];
        x = exp2_fast((x - rows.top[i / 2 % 2]) * given.scores.scale2);
      }
      P::from_sums(weights[j], s[j][0], s[j][1]);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float x = s[j][i / 4][i % 4];
        rows.total[i / 2 % 2] += x;
        rows.delta[i / 2 % 2] = fmaf(x, dp[i / 4][i % 4], rows.delta[i / 2 % 2]);
      }
    }
  }
  // Weights of all keys: of the first half where its P will be, of the second where dS will be.
  __device__ __forceinline__ void weigh(Rows& rows, bool known) const {
    const Lanes<P, DP> lanes;
    rows.total[0] = rows.total[1] = rows.delta[0] = rows.delta[1] = 0.0f;
    Channels<P, DP> query, grad;
    query.load(at + QUERY + member * 16 * ROW, lanes);
    grad.load(at + GRAD + member * 16 * ROW, lanes);
#pragma unroll 1
    for (int first = 0; first < TILES; first += AT_ONCE) {
      Some some;
      weigh_some(some, rows, first, known, query, grad, lanes);
      const uint32_t to = first < PART ? PROBABILITIES : DS;
#pragma unroll
      for (int i = 0; i < 4 * AT_ONCE; i++) {
        store_shared(word_of(first % PART + i / 4, i % 4) + to, some[i / 4].of[i % 4]);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) rows.total[r] = sum_of_row(rows.total[r]), rows.delta[r] = sum_of_row(rows.delta[r]);
  }

  // P and dS of the warp's queries and half of the keys, and their dQ, not yet scaled.
  __device__ __forceinline__ void score(
      Sums& dq, const Weights& weights, const float (&share)[2], const float (&delta)[2], int part) const {
    const Lanes<P, DP> lanes;
    const uint32_t keys = at + KEY + part * KEYS * ROW, values = at + VALUE + part * KEYS * ROW;
    Channels<P, DP> grad;
    grad.load(at + GRAD + member * 16 * ROW, lanes);
#pragma unroll
    for (int j = 0; j < PART; j++) {
      float p[2][4], ds[2][4];
      grad.template multiply<false>(ds, values + j * 16 * ROW, lanes);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        uint32_t word = weights[j].of[i];
        load_shared_if(word, word_of(j, i) + PROBABILITIES, part == 0);
        const float2 two = unpack<T>(word);
        float *const mine = &p[i / 2][i % 2 * 2], *const dp = &ds[i / 2][i % 2 * 2];
        mine[0] = two.x * share[i % 2], mine[1] = two.y * share[i % 2];
        dp[0] = mine[0] * (dp[0] - delta[i % 2]), dp[1] = mine[1] * (dp[1] - delta[i % 2]);
      }
      typename P::template Left<16> left, left_ds;
      P::from_sums(left, p[0], p[1]);
      P::from_sums(left_ds, ds[0], ds[1]);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint32_t mine = word_of(j, i);
        store_shared(mine + PROBABILITIES, left.of[i]);
        store_shared(mine + DS, left_ds.of[i]);
      }
      add_tokens<P, COLUMNS>(dq, left_ds, keys + j * 16 * ROW, lanes);
    }
  }

  // dV or dK of two tiles of this half of the keys, for CHANNELS times eight channels from eight times `from` on.
  template <int CHANNELS>
  __device__ __forceinline__ void sum_over_queries(int part, bool of_keys, int tile, int from) const {
    const Lanes<P, DP> lanes;
    float sums[OWN][CHANNELS][4];
#pragma unroll
    for (int i = 0; i < 4 * OWN * CHANNELS; i++) sums[i / 4 / CHANNELS][i / 4 % CHANNELS][i % 4] = 0.0f;
    uint32_t pairs = at + (of_keys ? DS : PROBABILITIES) + tile * 16 * SIZE;
    uint32_t rows = at + (of_keys ? QUERY : GRAD) + from * 8 * SIZE;
#pragma unroll 4
    for (int i = 0; i < TILES; i++, pairs += 16 * PAIRS * SIZE, rows += 16 * ROW) {
      typename P::template Left<16> a[OWN];
#pragma unroll
      for (int m = 0; m < OWN; m++) P::load_transposed(a[m], pairs + m * 16 * SIZE, PAIRS);
      add_tokens<P, CHANNELS>(sums, a, rows, lanes);
    }
    const float scale = of_keys ? given.scores.scale : 1.0f;
    const uint32_t to = at + (of_keys ? KEY : VALUE) + (part * KEYS + tile * 16 + (lane >> 2)) * ROW +
                        (from * 8 + 2 * (lane & 3)) * SIZE;
#pragma unroll
    for (int i = 0; i < 2 * OWN * CHANNELS; i++) {
      const float* const x = &sums[i / 2 / CHANNELS][i / 2 % CHANNELS][i % 2 * 2];
      P::store(
          to + (i / 2 / CHANNELS * 16 + i % 2 * 8) * ROW + i / 2 % CHANNELS * 8 * SIZE, x[0] * scale, x[1] * scale);
    }
  }

  __device__ __forceinline__ void run() {
    number_own_tokens();
    load(find(number_of(0)));
    wait_copies<0>();
    __syncthreads();
    float share[2], delta[2];
    {
      Rows rows;
      bool known = false, again;  // the same code twice, if at all
#pragma unroll 1
      do {
        weigh(rows, known);
        // A sum is NaN where no score of the first keys is above -infinity: fmaxf would hide it.
        again = !known && __any_sync(~0u, !(rows.total[0] < 32768.0f && rows.total[1] < 32768.0f));
        if (again) search(rows.top);
        known = true;
      } while (again);
#pragma unroll
      for (int r = 0; r < 2; r++) share[r] = reciprocal_fast(rows.total[r]), delta[r] = rows.delta[r] * share[r];
    }
    Weights weights;
#pragma unroll
    for (int i = 0; i < 4 * PART; i++) {
      weights[i / 4].of[i % 4] = __float_as_uint(load_shared(word_of(i / 4, i % 4) + DS));
    }
    Sums dq = {};
#pragma unroll 1
    for (int part = 0; part < TILES / PART; part++) {
      score(dq, weights, share, delta, part);
      __syncthreads();
      // Both halves of the channels for each of a processor's four schedulers.
      const int half = member >> 2 & 1, job = (member & 3) + (member >> 3) * 4;
      constexpr int MORE = (COLUMNS + 1) / 2;
      if (half == 0) {
        sum_over_queries<MORE>(part, job & 1, job / 2 * OWN, 0);
      } else {
        sum_over_queries<COLUMNS - MORE>(part, job & 1, job / 2 * OWN, MORE);
      }
      __syncthreads();
    }
    this->forget();
    const Unit unit = find(number_of(0));
    uint32_t packed[COLUMNS][2];
    pack_sums(packed, dq, given.scores.scale);
    put(QUERY, packed);
    store(QUERY, given.query_grad, unit, given.channels);
    store(KEY, given.key_grad, unit, given.channels);
    store(VALUE, given.value_grad, unit, given.value_channels);
  }
};

}  // namespace mvk::attention
