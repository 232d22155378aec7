// Products of a unit's tiles, and the bias: what forward and backward share.
#pragma once

#include "groups.cuh"

namespace mvk::attention {

// Of the four lanes that have a row of the sums of a product.
__device__ __forceinline__ float max_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float sum_of_row(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

template <class P, int DP>
using Lanes = typename P::template Lanes<P::stride(DP)>;

// c += A B for 16 rows: A of registers, with as many columns as there are channels, B 16 rows of a tile, turned.
template <class P, int DP>
struct Channels {
  static constexpr int SIZE = sizeof(typename P::Element);
  typename P::template Left<16> of[DP < 16 ? 1 : DP / 16];
  typename P::template Left<8> rest;

  template <class LANES>
  __device__ __forceinline__ void load(uint32_t at, const LANES& lanes) {
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

// The same as Channels::multiply, turned, for several A: what is read of B serves all.
template <class P, int DP, int TILES>
__device__ __forceinline__ void multiply_all(
    float (&c)[TILES][2][4], const Channels<P, DP> (&a)[TILES], uint32_t at, const Lanes<P, DP>& lanes) {
  constexpr int SIZE = sizeof(typename P::Element);
#pragma unroll
  for (int i = 0; i < 8 * TILES; i++) c[i / 8][i / 4 % 2][i % 4] = 0.0f;
#pragma unroll
  for (int k = 0; k < DP / 16; k++) {
    typename P::template Right<16> b[2];
    P::load(b, at + 16 * k * SIZE, lanes);
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) P::template multiply<true>(c[i / 2][i % 2], a[i / 2].of[k], b[i % 2]);
  }
  if constexpr (DP % 16 != 0) {
    typename P::template Right<8> b[2];
    P::load(b, at + DP / 16 * 16 * SIZE, lanes);
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) P::template multiply<true>(c[i / 2][i % 2], a[i / 2].rest, b[i % 2]);
  }
}

// c += A B for 16 rows of each of several A: A has 16 tokens as columns, B is those tokens' rows of a tile.
template <class P, int COLUMNS, int TILES, class LANES>
__device__ __forceinline__ void add_tokens(
    float (&c)[TILES][COLUMNS][4], const typename P::template Left<16> (&a)[TILES], uint32_t at, const LANES& lanes) {
  constexpr int SIZE = sizeof(typename P::Element);
#pragma unroll
  for (int n = 0; n < COLUMNS / 2; n++) {
    typename P::template Right<16> b[2];
    P::load_tokens(b, at + n * 16 * SIZE, lanes);
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) P::template multiply<false>(c[i / 2][2 * n + i % 2], a[i / 2], b[i % 2]);
  }
  if constexpr (COLUMNS % 2 != 0) {
    typename P::template Right<16> b[1];
    P::load_tokens(b, at + (COLUMNS - 1) * 8 * SIZE, lanes);
#pragma unroll
    for (int m = 0; m < TILES; m++) P::template multiply<false>(c[m][COLUMNS - 1], a[m], b[0]);
  }
}
template <class P, int COLUMNS, class LANES>
__device__ __forceinline__ void add_tokens(
    float (&c)[COLUMNS][4], const typename P::template Left<16>& a, uint32_t at, const LANES& lanes) {
  using Sums = float[1][COLUMNS][4];
  using Operands = const typename P::template Left<16>[1];
  add_tokens<P, COLUMNS>(reinterpret_cast<Sums&>(c), reinterpret_cast<Operands&>(a), at, lanes);
}

// The products of tiles of 16 rows, one after the other from `left` on, with 16 rows of another tile, over all
// channels. Their sums are, bit by bit, those of Channels::multiply of the transposed product.
template <class P, int DP, int TILES>
__device__ __forceinline__ void multiply_turned(
    float (&c)[TILES][2][4], uint32_t left, uint32_t right, const Lanes<P, DP>& lanes) {
  constexpr int SIZE = sizeof(typename P::Element), TILE = 16 * P::stride(DP) * SIZE;
#pragma unroll
  for (int i = 0; i < 8 * TILES; i++) c[i / 8][i / 4 % 2][i % 4] = 0.0f;
#pragma unroll
  for (int k = 0; k < DP / 16; k++) {
    typename P::template Right<16> b[2];
    P::load(b, right + 16 * k * SIZE, lanes);
#pragma unroll
    for (int m = 0; m < TILES; m++) {
      typename P::template Left<16> a;
      P::load(a, left + m * TILE + 16 * k * SIZE, lanes);
      P::template multiply<true>(c[m][0], a, b[0]);
      P::template multiply<true>(c[m][1], a, b[1]);
    }
  }
  if constexpr (DP % 16 != 0) {
    typename P::template Right<8> b[2];
    P::load(b, right + DP / 16 * 16 * SIZE, lanes);
#pragma unroll
    for (int m = 0; m < TILES; m++) {
      typename P::template Left<8> a;
      P::load(a, left + m * TILE + DP / 16 * 16 * SIZE, lanes);
      P::template multiply<true>(c[m][0], a, b[0]);
      P::template multiply<true>(c[m][1], a, b[1]);
    }
  }
}

// Replaces the columns, of 16, that are no tokens according to the mask.
__device__ __forceinline__ void mask_columns(float (&s)[2][4], uint32_t mask, float with) {
  if (mask == 0xffff) return;
  mask >>= 2 * (lane_id() & 3);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    if (!(mask >> (i / 4 * 8 + (i & 1)) & 1)) s[i / 4][i % 4] = with;
  }
}

}  // namespace mvk::attention
