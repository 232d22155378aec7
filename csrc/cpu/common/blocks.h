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

// Whether tokens n .. n + count - 1, at most W of them, lie side by side.
template <class T, class S>
MVK_INLINE bool side_by_side(const LatticeOf<S>& m, int64_t n, int count) {
  return m.step == 1 && m.offset[n + count - 1] - m.offset[n] == count - 1;
}

// block[j] = tokens n .. n + tokens of dim d + j, for `dims` of them, zeros elsewhere. For any strides.
template <class T, class S>
MVK_INLINE void load_by_dim(const LatticeOf<S>& m, int64_t n, int tokens, int64_t d, int dims, vec<T>* block) {
  const bool together = side_by_side<T>(m, n, tokens), whole = together && tokens >= W<T>;
#pragma GCC unroll 16
  for (int j = 0; j < W<T>; ++j) {
    vec<T> v = {};
    if (j < dims) {
      const S* p = m.data + (d + j) * m.d;
      if (whole) {
        v = load<T>(p + m.offset[n]);
      } else if (together) {
        v = load_partial<T>(p + m.offset[n], tokens);
      } else {
        T lanes[W<T>] = {};
        for (int i = 0; i < tokens && i < W<T>; ++i) lanes[i] = to_float(p[m.offset[n + i]]);
        v = load<T>(lanes);
      }
    }
    block[j] = v;
  }
}

// block[j] (dims d + j, tokens n ..) into the map.
template <class T, class S>
MVK_INLINE void store_by_dim(const LatticeOf<S>& m, int64_t n, int tokens, int64_t d, int dims, const vec<T>* block) {
  const bool whole = tokens == W<T> && side_by_side<T>(m, n, tokens);
  for (int j = 0; j < dims; ++j) {
    S* p = m.data + (d + j) * m.d;
    if (whole) {
      store_as<T>(p + m.offset[n], block[j]);
    } else {
      T lanes[W<T>];
      store<T>(lanes, block[j]);
      for (int i = 0; i < tokens; ++i) from_float(lanes[i], p + m.offset[n + i]);
    }
  }
}

}  // namespace
}  // namespace MVK_ISA
}  // namespace mvk
