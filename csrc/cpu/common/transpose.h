// Transposes of vectors in registers, and what is made like one.
#pragma once

#include "common/simd.h"

namespace mvk {
namespace MVK_ISA {
namespace {

// Elements of a 128-bit block, within which unpacking is one instruction.
template <class T>
constexpr int kBlockLanes = 16 / sizeof(T);

// In each 128-bit block, groups of g lanes of a and b in turn, from the lower or the upper half.
template <class T, int g, bool upper, size_t... I>
MVK_INLINE vec<T> unpack(vec<T> a, vec<T> b, std::index_sequence<I...>) {
  constexpr int E = kBlockLanes<T>;
  return __builtin_shufflevector(
      a, b,
      (int(I) / E * E + (int(I) % E / g / 2 + (upper ? E / g / 2 : 0)) * g + int(I) % g +
       (int(I) / g % 2 ? W<T> : 0))...);
}
// The even or the odd 128-bit blocks of a, then of b.
template <class T, bool odd, size_t... I>
MVK_INLINE vec<T> blocks(vec<T> a, vec<T> b, std::index_sequence<I...>) {
  constexpr int E = kBlockLanes<T>, n = W<T> / E;
  return __builtin_shufflevector(
      a, b, ((2 * (int(I) / E) % n + odd) * E + int(I) % E + (int(I) / E * 2 >= n ? W<T> : 0))...);
}

// Transpose W x W in registers: within 128-bit blocks, then the blocks. Every step is one instruction that keeps its
// operands, so that 16 rows pass through 32 registers.
template <class T>
MVK_INLINE void transpose(vec<T>* r) {
  constexpr int E = kBlockLanes<T>, n = W<T> / E;
  constexpr auto all = std::make_index_sequence<W<T>>{};
#pragma GCC unroll 8
  for (int k = 0; k < W<T>; k += E) {
    if constexpr (E == 4) {
      const vec<T> a = unpack<T, 1, false>(r[k], r[k + 1], all), b = unpack<T, 1, true>(r[k], r[k + 1], all);
      const vec<T> c = unpack<T, 1, false>(r[k + 2], r[k + 3], all), d = unpack<T, 1, true>(r[k + 2], r[k + 3], all);
      r[k] = unpack<T, 2, false>(a, c, all), r[k + 1] = unpack<T, 2, true>(a, c, all);
      r[k + 2] = unpack<T, 2, false>(b, d, all), r[k + 3] = unpack<T, 2, true>(b, d, all);
    } else {
      const vec<T> a = r[k];
      r[k] = unpack<T, 1, false>(a, r[k + 1], all), r[k + 1] = unpack<T, 1, true>(a, r[k + 1], all);
    }
  }
  // Block j of r[E k + c] is now column E j + c of rows E k and on.
#pragma GCC unroll 4
  for (int c = 0; c < E; ++c) {
    if constexpr (n == 4) {
      const vec<T> a = blocks<T, false>(r[c], r[E + c], all), b = blocks<T, true>(r[c], r[E + c], all);
      const vec<T> d = blocks<T, false>(r[2 * E + c], r[3 * E + c], all);
      const vec<T> e = blocks<T, true>(r[2 * E + c], r[3 * E + c], all);
      r[c] = blocks<T, false>(a, d, all), r[2 * E + c] = blocks<T, true>(a, d, all);
      r[E + c] = blocks<T, false>(b, e, all), r[3 * E + c] = blocks<T, true>(b, e, all);
    } else if constexpr (n == 2) {
      const vec<T> a = r[c];
      r[c] = blocks<T, false>(a, r[E + c], all), r[E + c] = blocks<T, true>(a, r[E + c], all);
    }
  }
}

// Two rows exchange blocks of `step` lanes across the diagonal.
template <class T, int step, size_t... I>
MVK_INLINE void exchange(vec<T>& a, vec<T>& b, std::index_sequence<I...>) {
  constexpr int n = W<T>;
  vec<T> low = __builtin_shufflevector(a, b, ((int(I) & step) ? n + int(I) - step : int(I))...);
  b = __builtin_shufflevector(a, b, ((int(I) & step) ? n + int(I) : int(I) + step)...);
  a = low;
}
// rows[0] becomes the sums across lanes of all rows: lane i that of row i. As a transpose whose halves are added at
// each step.
template <class T, int step = W<T> / 2>
MVK_INLINE void add_across(vec<T>* rows) {
#pragma GCC unroll 8
  for (int i = 0; i < step; ++i) {
    exchange<T, step>(rows[i], rows[i + step], std::make_index_sequence<W<T>>{});
    rows[i] += rows[i + step];
  }
  if constexpr (step > 1) add_across<T, step / 2>(rows);
}
}  // namespace
}  // namespace MVK_ISA
}  // namespace mvk
