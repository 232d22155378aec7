// Blocks of W tokens by W dims of a lattice, loaded and stored along the direction that is contiguous in memory.
#pragma once

#include "common/lattice.h"

namespace mvk {
namespace MVK_ISA {
namespace {

// A lattice whose elements' type is known.
template <class S>
struct LatticeOf {
  S* data;
  const int64_t* offset;
  int64_t d, step;
  explicit LatticeOf(const Lattice& m) : data(m.data.as<S>()), offset(m.offset), d(m.d), step(m.step) {}
};

// Whether the tokens are taken by runs of neighbours, a line of a window for example, which rarely fills a vector; else one by one.
template <class S>
MVK_INLINE bool in_runs(const LatticeOf<S>& m) {
  return kLanesAtOnce<S> && m.step == 1;
}

// f(lane, token, count) for the runs among tokens n .. n + tokens - 1, at most W of them.
template <class S, class F>
MVK_INLINE void runs(const LatticeOf<S>& m, int64_t n, int tokens, const F& f) {
  for (int i = 0, count = 1; i < tokens; i += count, count = 1) {
    while (i + count < tokens && m.offset[n + i + count] - m.offset[n + i] == count) ++count;
    f(i, n + i, count);
  }
}

// Whether tokens n .. n + W - 1 are one run.
template <class T, class S>
MVK_INLINE bool one_run(const LatticeOf<S>& m, int64_t n, int tokens) {
  return tokens == W<T> && m.step == 1 && m.offset[n + W<T> - 1] - m.offset[n] == W<T> - 1;
}

// block[j] = tokens n .. n + tokens of dim d + j, for `dims` of them, zeros elsewhere. For any strides.
template <class T, class S>
MVK_INLINE void load_by_dim(const LatticeOf<S>& m, int64_t n, int tokens, int64_t d, int dims, vec<T>* block) {
  const S* first = m.data + d * m.d;
  if (one_run<T>(m, n, tokens)) {
#pragma GCC unroll 16
    for (int j = 0; j < W<T>; ++j) block[j] = j < dims ? load<T>(first + j * m.d + m.offset[n]) : vec<T>{};
  } else if (in_runs(m)) {
#pragma GCC unroll 16
    for (int j = 0; j < W<T>; ++j) block[j] = vec<T>{};
    runs(m, n, tokens, [&](int lane, int64_t token, int count) __attribute__((always_inline)) {
      const S* p = first + m.offset[token];
#pragma GCC unroll 16
      for (int j = 0; j < W<T>; ++j)
        if (j < dims) block[j] = load_lanes<T>(block[j], p + j * m.d, lane, count);
    });
  } else {
#pragma GCC unroll 16
    for (int j = 0; j < W<T>; ++j) {
      T lanes[W<T>] = {};
      for (int i = 0; j < dims && i < tokens && i < W<T>; ++i) lanes[i] = to_float(first[j * m.d + m.offset[n + i]]);
      block[j] = load<T>(lanes);
    }
  }
}

// block[j] (dims d + j, tokens n ..) into the map.
template <class T, class S>
MVK_INLINE void store_by_dim(const LatticeOf<S>& m, int64_t n, int tokens, int64_t d, int dims, const vec<T>* block) {
  S* first = m.data + d * m.d;
  if (one_run<T>(m, n, tokens)) {
    for (int j = 0; j < dims; ++j) store_as<T>(first + j * m.d + m.offset[n], block[j]);
  } else if (in_runs(m)) {
    runs(m, n, tokens, [&](int lane, int64_t token, int count) __attribute__((always_inline)) {
      for (int j = 0; j < dims; ++j) store_lanes<T>(first + j * m.d + m.offset[token], block[j], lane, count);
    });
  } else {
    for (int j = 0; j < dims; ++j) {
      T lanes[W<T>];
      store<T>(lanes, block[j]);
      for (int i = 0; i < tokens; ++i) from_float(lanes[i], first + j * m.d + m.offset[n + i]);
    }
  }
}

}  // namespace
}  // namespace MVK_ISA
}  // namespace mvk
