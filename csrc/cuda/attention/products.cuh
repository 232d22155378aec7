// Products of a unit's tiles, and the bias: what forward and backward share.
#pragma once

#include "groups.cuh"

namespace mvk::attention {

constexpr float LOG2E = 1.4426950408889634f;

template <class P, int DP>
using Lanes = typename P::template Lanes<P::stride(DP)>;

// c += A B for 16 rows: A of registers, with as many columns as there are channels, B 16 rows of a tile, turned.
template <class P, int DP>
struct Channels {
  static constexpr int SIZE = sizeof(typename P::Element);
  typename P::template Left<16> of[DP / 16];
  typename P::template Left<8> rest;

  __device__ __forceinline__ void load(uint32_t at, const Lanes<P, DP>& lanes) {
#pragma unroll
    for (int k = 0; k < DP / 16; k++) P::load(of[k], at + 16 * k * SIZE, lanes);
    if constexpr (DP % 16 != 0) P::load(rest, at + DP / 16 * 16 * SIZE, lanes);
  }
  template <bool TURNED>
  __device__ __forceinline__ void multiply(float (&c)[2][4], uint32_t at, const Lanes<P, DP>& lanes) const {
#pragma unroll
    for (int i = 0; i < 8; i++) c[i / 4][i % 4] = 0.0f;
#pragma unroll
    for (int k = 0; k < DP / 16; k++) {
      typename P::template Right<16> b[2];
      P::load(b, at + 16 * k * SIZE, lanes);
      P::template multiply<TURNED>(c[0], of[k], b[0]);
      P::template multiply<TURNED>(c[1], of[k], b[1]);
    }
    if constexpr (DP % 16 != 0) {
      typename P::template Right<8> b[2];
      P::load(b, at + DP / 16 * 16 * SIZE, lanes);
      P::template multiply<TURNED>(c[0], rest, b[0]);
      P::template multiply<TURNED>(c[1], rest, b[1]);
    }
  }
};

// c += A B for 16 rows: A has 16 tokens as columns, B is those tokens' rows of a tile.
template <class P, int DP>
__device__ __forceinline__ void add_tokens(
    float (&c)[DP / 8][4], const typename P::template Left<16>& a, uint32_t at, const Lanes<P, DP>& lanes) {
  constexpr int SIZE = sizeof(typename P::Element), COLUMNS = DP / 8;
#pragma unroll
  for (int n = 0; n < COLUMNS / 2; n++) {
    typename P::template Right<16> b[2];
    P::load_tokens(b, at + n * 16 * SIZE, lanes);
    P::template multiply<false>(c[2 * n], a, b[0]);
    P::template multiply<false>(c[2 * n + 1], a, b[1]);
  }
  if constexpr (COLUMNS % 2 != 0) {
    typename P::template Right<16> b[1];
    P::load_tokens(b, at + (COLUMNS - 1) * 8 * SIZE, lanes);
    P::template multiply<false>(c[COLUMNS - 1], a, b[0]);
  }
}

// The product of 16 rows of a tile and of 16 rows of another, both of as many columns as there are channels. All is as in
// Channels, and so are the sums of a product that is the transpose of one of those.
template <class P, int DP>
__device__ __forceinline__ void multiply_turned(
    float (&c)[2][4], uint32_t left, uint32_t right, const Lanes<P, DP>& lanes) {
  constexpr int SIZE = sizeof(typename P::Element);
#pragma unroll
  for (int i = 0; i < 8; i++) c[i / 4][i % 4] = 0.0f;
#pragma unroll
  for (int k = 0; k < DP / 16; k++) {
    typename P::template Right<16> b[2];
    typename P::template Left<16> a;
    P::load(b, right + 16 * k * SIZE, lanes);
    P::load(a, left + 16 * k * SIZE, lanes);
    P::template multiply<true>(c[0], a, b[0]);
    P::template multiply<true>(c[1], a, b[1]);
  }
  if constexpr (DP % 16 != 0) {
    typename P::template Right<8> b[2];
    typename P::template Left<8> a;
    P::load(b, right + DP / 16 * 16 * SIZE, lanes);
    P::load(a, left + DP / 16 * 16 * SIZE, lanes);
    P::template multiply<true>(c[0], a, b[0]);
    P::template multiply<true>(c[1], a, b[1]);
  }
}

template <typename T>
struct Bias {
  const T* at;
  int64_t head;  // negative: there is no bias
  int query, key, tokens;

  // Scores in base 2 of the queries from m on and the keys from n on, 16 of each; TURNED: rows are keys.
  template <bool TURNED>
  __device__ __forceinline__ void scale(float (&s)[2][4], float scale2, int unit_head, int m, int n) const {
    const int g = lane_id() >> 2, t = 2 * (lane_id() & 3);
    const T* from = at + unit_head * head;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int row = g + (i & 2) * 4, column = t + i / 4 * 8 + (i & 1);
      float& x = s[i / 4][i % 4];
      x *= scale2;
      if (head >= 0) {
        const int q = min(m + (TURNED ? column : row), tokens - 1);
        const int k = min(n + (TURNED ? row : column), tokens - 1);
        x = fmaf(to_float(from[q * query + k * key]), LOG2E, x);
      }
    }
  }
};

// -inf where the mask of 16 columns says that there is no token.
__device__ __forceinline__ void mask_columns(float (&s)[2][4], uint32_t mask, float with) {
  mask >>= 2 * (lane_id() & 3);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    if (!(mask >> (i / 4 * 8 + (i & 1)) & 1)) s[i / 4][i % 4] = with;
  }
}

}  // namespace mvk::attention
