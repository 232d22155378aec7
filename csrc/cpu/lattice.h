// Reading and writing the pixels of one group of a map, whatever its strides: blocks of W pixels x W dims are
// loaded along the direction that is contiguous in memory and transposed in registers where the other one is wanted.
#pragma once

#include <cstdlib>

#include "gemm.h"
#include "patch_attention.h"

namespace mvk {
namespace MVK_ISA {
namespace {

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Leading dimension of packed rows: whole vectors, and not a multiple of 128 bytes, since rows a power of two
// apart fall into the same few cache sets.
template <class T>
constexpr int64_t leading(int64_t cols) {
  int64_t ld = round_up(cols, W<T>);
  return ld * int64_t(sizeof(T)) % 128 == 0 ? ld + W<T> : ld;
}

// Scratch of a thread, kept between calls: fresh pages cost more than the work on a small map.
class Arena {
 public:
  ~Arena() { free(base_); }
  void reset(size_t bytes, bool poison) {
    if (bytes > size_) {
      free(base_);
      size_ = round_up(bytes, 4096);
      base_ = static_cast<char*>(aligned_alloc(64, size_));
      if (!base_) {
        size_ = 0;
        __builtin_trap();
      }
    }
    if (poison) memset(base_, 0xff, size_);  // all ones is a NaN in every type
    used_ = 0;
  }
  template <class T>
  T* take(int64_t count) {
    T* out = reinterpret_cast<T*>(base_ + used_);
    used_ += bytes<T>(count);
    return out;
  }
  template <class T>
  static size_t bytes(int64_t count) {
    return round_up(count * sizeof(T) + 64, 64);
  }

 private:
  char* base_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

// The pixels of a group in one map. `offset[n]` leads from the map's first element of a (batch, head) to token n.
template <class S>
struct Lattice {
  S* data;
  const int64_t* offset;
  int64_t d, step;
};

// Offsets of the tokens of a group, kept while group and strides stay the same (heads share them).
struct Offsets {
  int64_t* table;
  int64_t group = -1, y = 0, x = 0;
  const int64_t* of(const PatchAttention& a, const Map& map, int64_t g) {
    if (g == group && map.y == y && map.x == x) return table;
    group = g, y = map.y, x = map.x;
    int64_t y0 = g / a.groups_x(), x0 = g % a.groups_x();
    int64_t* out = table;
    for (int64_t i = y0; i < a.H; i += a.ph)
      for (int64_t j = x0; j < a.W; j += a.pw) *out++ = i * map.y + j * map.x;
    return table;
  }
};

template <class S>
MVK_INLINE Lattice<S> lattice(
    const PatchAttention& a, const Map& map, Offsets& offsets, int64_t b, int64_t h, int64_t g) {
  S* data = static_cast<S*>(map.data) + b * map.b + h * map.h;
  return {data, offsets.of(a, map, g), map.d, map.x * a.pw};
}

// Whether tokens n .. n + W - 1 lie side by side.
template <class T, class S>
MVK_INLINE bool side_by_side(const Lattice<S>& m, int64_t n) {
  return m.step == 1 && m.offset[n + W<T> - 1] - m.offset[n] == W<T> - 1;
}

// block[i] = dims d .. d + dims of token n + i, for `tokens` of them, zeros elsewhere. For maps with d stride 1.
template <class T, class S>
MVK_INLINE void load_by_token(const Lattice<S>& m, int64_t n, int tokens, int64_t d, int dims, vec<T>* block) {
#pragma GCC unroll 16
  for (int i = 0; i < W<T>; ++i) {
    if (i >= tokens) {
      block[i] = vec<T>{};
    } else {
      const S* p = m.data + m.offset[n + i] + d;
      block[i] = dims >= W<T> ? load<T>(p) : load_partial<T>(p, dims);
    }
  }
}

// block[j] = tokens n .. n + tokens of dim d + j, for `dims` of them, zeros elsewhere. For any strides.
template <class T, class S>
MVK_INLINE void load_by_dim(const Lattice<S>& m, int64_t n, int tokens, int64_t d, int dims, vec<T>* block) {
  const bool whole = tokens >= W<T> && side_by_side<T>(m, n);
#pragma GCC unroll 16
  for (int j = 0; j < W<T>; ++j) {
    vec<T> v = {};
    if (j < dims) {
      const S* p = m.data + (d + j) * m.d;
      if (whole) {
        v = load<T>(p + m.offset[n]);
      } else {
        T lanes[W<T>] = {};
        for (int i = 0; i < tokens && i < W<T>; ++i) lanes[i] = to_float(p[m.offset[n + i]]);
        v = load<T>(lanes);
      }
    }
    block[j] = v;
  }
}

template <class T>
MVK_INLINE int at_most(int64_t n) {
  return n < W<T> ? int(n) : W<T>;
}

// dst[(n - begin) * ld + d] = token n, dim d; columns up to a whole vector are zero.
template <class T, class S>
static void pack_rows(const Lattice<S>& m, int64_t begin, int64_t end, int64_t dims, T* dst, int64_t ld) {
  if (m.d == 1) {
    for (int64_t n = begin; n < end; ++n, dst += ld) {
      const S* p = m.data + m.offset[n];
      int64_t d = 0;
      for (; d + W<T> <= dims; d += W<T>) store<T>(dst + d, load<T>(p + d));
      if (d < dims) store<T>(dst + d, load_partial<T>(p + d, int(dims - d)));
    }
    return;
  }
  vec<T> block[W<T>];
  for (int64_t n = begin; n < end; n += W<T>, dst += W<T> * ld) {
    const int tokens = at_most<T>(end - n);
    for (int64_t d = 0; d < dims; d += W<T>) {
      load_by_dim<T>(m, n, tokens, d, at_most<T>(dims - d), block);
      transpose<T>(block);
      for (int i = 0; i < tokens; ++i) store<T>(dst + i * ld + d, block[i]);
    }
  }
}

// Transposed, in panels of kPanel tokens: dst[(n / kPanel) * dims * kPanel + d * kPanel + n % kPanel] = factor * token
// n, dim d. Tokens up to a whole vector are zero.
template <class T, class S>
static void pack_panels(const Lattice<S>& m, int64_t count, int64_t dims, T factor, T* dst) {
  vec<T> block[W<T>];
  const vec<T> f = splat<T>(factor);
  for (int64_t n = 0; n < count; n += W<T>) {
    const int tokens = at_most<T>(count - n);
    T* panel = dst + n / kPanel<T> * dims * kPanel<T> + n % kPanel<T>;
    for (int64_t d = 0; d < dims; d += W<T>) {
      const int some = at_most<T>(dims - d);
      if (m.d == 1) {
        load_by_token<T>(m, n, tokens, d, some, block);
        transpose<T>(block);
      } else {
        load_by_dim<T>(m, n, tokens, d, some, block);
      }
      for (int j = 0; j < some; ++j) store<T>(panel + (d + j) * kPanel<T>, f * block[j]);
    }
  }
}

// Token n, dim d of the map = src[(n - begin) * ld + d] * factor. src has whole vectors, and rows up to a whole vector of
// tokens where the map's dims are not contiguous.
template <class T, class S>
static void unpack_rows(const Lattice<S>& m, int64_t begin, int64_t end, int64_t dims, const T* src, int64_t ld, T factor) {
  const vec<T> f = splat<T>(factor);
  if (m.d == 1) {
    for (int64_t n = begin; n < end; ++n, src += ld) {
      S* p = m.data + m.offset[n];
      int64_t d = 0;
      for (; d + W<T> <= dims; d += W<T>) store_as<T>(p + d, f * load<T>(src + d));
      if (d < dims) store_partial<T>(p + d, f * load<T>(src + d), int(dims - d));
    }
    return;
  }
  vec<T> block[W<T>];
  for (int64_t n = begin; n < end; n += W<T>, src += W<T> * ld) {
    const int tokens = at_most<T>(end - n);
    const bool whole = tokens == W<T> && side_by_side<T>(m, n);
    for (int64_t d = 0; d < dims; d += W<T>) {
      const int some = at_most<T>(dims - d);
      for (int i = 0; i < W<T>; ++i) block[i] = i < tokens ? f * load<T>(src + i * ld + d) : vec<T>{};
      transpose<T>(block);
      for (int j = 0; j < some; ++j) {
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
  }
}

}  // namespace
}  // namespace MVK_ISA
}  // namespace mvk
