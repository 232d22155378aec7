// Reading and writing the pixels of one group of a map, whatever its strides: blocks of W pixels x W dims are
// loaded along the direction that is contiguous in memory and transposed in registers where the other one is wanted.
#pragma once

#include <cstdlib>

#include "common/gemm.h"
#include "common/map.h"

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

static thread_local Arena arena;

// The tokens of a group in one map: token n, dim i at data[offset[n] + i * d].
template <class S>
struct Lattice {
  S* data;
  const int64_t* offset;
  int64_t d, step;
};

// Whether tokens n .. n + count - 1, at most W of them, lie side by side.
template <class T, class S>
MVK_INLINE bool side_by_side(const Lattice<S>& m, int64_t n, int count) {
  return m.step == 1 && m.offset[n + count - 1] - m.offset[n] == count - 1;
}

// block[j] = tokens n .. n + tokens of dim d + j, for `dims` of them, zeros elsewhere. For any strides.
template <class T, class S>
MVK_INLINE void load_by_dim(const Lattice<S>& m, int64_t n, int tokens, int64_t d, int dims, vec<T>* block) {
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

// Transposed, V vectors of tokens side by side: dst[d * ldd + i] = factor * token begin + i, dim d. Tokens up to
// whole vectors are zero.
template <class T, class S>
static void pack_panel(const Lattice<S>& m, int64_t begin, int64_t end, int64_t dims, T factor, T* dst, int64_t ldd) {
  const vec<T> f = splat<T>(factor);
  // Blocks are known to be whole at compile time where they are, and stay in registers.
  auto turn = [&](auto whole, int64_t n, int tokens, int64_t d, int some) __attribute__((always_inline)) {
    vec<T> block[W<T>];
#pragma GCC unroll 16
    for (int i = 0; i < W<T>; ++i) {
      if (!whole && i >= tokens) {
        block[i] = vec<T>{};
      } else {
        const S* p = m.data + m.offset[n + i] + d;
        block[i] = whole ? load<T>(p) : load_partial<T>(p, some);
      }
    }
    transpose<T>(block);
#pragma GCC unroll 16
    for (int j = 0; j < W<T>; ++j)
      if (whole || j < some) store<T>(dst + (d + j) * ldd, f * block[j]);
  };
  for (int64_t n = begin; n < end; n += W<T>, dst += W<T>) {
    const int tokens = at_most<T>(end - n);
    for (int64_t d = 0; d < dims; d += W<T>) {
      const int some = at_most<T>(dims - d);
      if (m.d == 1 && tokens == W<T> && some == W<T>) {
        turn(std::true_type{}, n, tokens, d, some);
      } else if (m.d == 1) {
        turn(std::false_type{}, n, tokens, d, some);
      } else {
        vec<T> block[W<T>];
        load_by_dim<T>(m, n, tokens, d, some, block);
#pragma GCC unroll 16
        for (int j = 0; j < W<T>; ++j)
          if (j < some) store<T>(dst + (d + j) * ldd, f * block[j]);
      }
    }
  }
}

// Rows [count][ld] cut into tall panels: panel i holds dims d0 .. d0 + r of every row, r apart, from dst + count * d0 + i * W.
// Whole vectors are stored, each over the end of the one before it; a panel has W spare elements for the last.
template <class T>
static void pack_tall(const T* rows, int64_t ld, int64_t count, const Tiles& tiles, T* dst) {
  for (int i = 0; i < tiles.count; ++i) {
    const int r = tiles.height + (i < tiles.taller);
    for (int64_t n = 0; n < count; ++n)
      for (int d = 0; d < r; d += W<T>) store<T>(dst + n * r + d, load<T>(rows + n * ld + d));
    rows += r;
    dst += count * r + W<T>;
  }
}
template <class T>
int64_t tall_size(int64_t count, int64_t dims) {
  return (count + W<T>)*dims + W<T>;
}

// block[j] (dims d + j, tokens n ..) into the map.
template <class T, class S>
MVK_INLINE void store_by_dim(const Lattice<S>& m, int64_t n, int tokens, int64_t d, int dims, const vec<T>* block) {
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

// Token begin + i, dim d of the map = factor[i * step] * src[i * ld + d]. src has whole vectors, and a whole vector of rows.
template <class T, class S>
static void unpack_rows(
    const Lattice<S>& m, int64_t begin, int64_t end, int64_t dims, const T* src, int64_t ld, const T* factor,
    int64_t step) {
  if (m.d == 1) {
    for (int64_t n = begin; n < end; ++n, src += ld, factor += step) {
      const vec<T> f = splat<T>(*factor);
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
    for (int64_t d = 0; d < dims; d += W<T>) {
      for (int i = 0; i < W<T>; ++i)
        block[i] = i < tokens ? splat<T>(factor[i * step]) * load<T>(src + i * ld + d) : vec<T>{};
      transpose<T>(block);
      store_by_dim<T>(m, n, tokens, d, at_most<T>(dims - d), block);
    }
    factor += W<T> * step;
  }
}

// Token begin + i, dim d of the map = factor[i] * src[d * lds + i], factor null for 1. src has whole vectors.
template <class T, class S>
static void unpack_panel(
    const Lattice<S>& m, int64_t begin, int64_t end, int64_t dims, const T* src, int64_t lds, const T* factor) {
  auto turn = [&](auto whole, vec<T> f, int64_t n, int tokens, int64_t d, int some) __attribute__((always_inline)) {
    vec<T> block[W<T>];
#pragma GCC unroll 16
    for (int j = 0; j < W<T>; ++j) block[j] = whole || j < some ? f * load<T>(src + (d + j) * lds) : vec<T>{};
    transpose<T>(block);
#pragma GCC unroll 16
    for (int i = 0; i < W<T>; ++i) {
      if (!whole && i >= tokens) break;
      S* p = m.data + m.offset[n + i] + d;
      if (whole || some == W<T>)
        store_as<T>(p, block[i]);
      else
        store_partial<T>(p, block[i], some);
    }
  };
  for (int64_t n = begin; n < end; n += W<T>, src += W<T>) {
    const int tokens = at_most<T>(end - n);
    const vec<T> f = factor ? load<T>(factor + (n - begin)) : splat(T(1));
    for (int64_t d = 0; d < dims; d += W<T>) {
      const int some = at_most<T>(dims - d);
      if (m.d == 1 && tokens == W<T> && some == W<T>) {
        turn(std::true_type{}, f, n, tokens, d, some);
      } else if (m.d == 1) {
        turn(std::false_type{}, f, n, tokens, d, some);
      } else {
        vec<T> block[W<T>];
        for (int j = 0; j < W<T>; ++j) block[j] = j < some ? f * load<T>(src + (d + j) * lds) : vec<T>{};
        store_by_dim<T>(m, n, tokens, d, some, block);
      }
    }
  }
}

}  // namespace

// Instantiates name<T, S> for each dtype: computed in T, S in memory.
#define MVK_BY_DTYPE(Arguments, name)                                    \
  void name##_by_dtype(const Arguments& a, int64_t begin, int64_t end) { \
    switch (a.dtype) {                                                   \
      case DType::f32:                                                   \
        return name<float, float>(a, begin, end);                        \
      case DType::f64:                                                   \
        return name<double, double>(a, begin, end);                      \
      case DType::f16:                                                   \
        return name<float, half>(a, begin, end);                         \
      case DType::bf16:                                                  \
        return name<float, bfloat>(a, begin, end);                       \
    }                                                                    \
  }

}  // namespace MVK_ISA
}  // namespace mvk
