// Reading and writing the tokens of a lattice, for each type that a map's elements can have.
#include "common/lattice.h"

#include "common/blocks.h"
#include "common/transpose.h"

namespace mvk {
namespace MVK_ISA {
namespace {

template <class T, class S>
static void pack_rows_of(const LatticeOf<S>& m, int64_t begin, int64_t end, int64_t dims, T* dst, int64_t ld) {
  if (m.d == 1) {
    for (int64_t n = begin; n < end; ++n, dst += ld) take_row<T>(m.data + m.offset[n], dims, dst);
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

template <class T, class S>
static void pack_panel_of(
    const LatticeOf<S>& m, int64_t begin, int64_t end, int64_t dims, T factor, T* dst, int64_t ldd) {
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

template <class T, class S>
static void unpack_rows_of(
    const LatticeOf<S>& m, int64_t begin, int64_t end, int64_t dims, const T* src, int64_t ld, const T* factor,
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

template <class T, class S>
static void unpack_panel_of(
    const LatticeOf<S>& m, int64_t begin, int64_t end, int64_t dims, const T* src, int64_t lds, const T* factor) {
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

template <class T>
void pack_rows(const Lattice& m, int64_t begin, int64_t end, int64_t dims, T* dst, int64_t ld) {
  with_type<T>(m.data.dtype, [&](auto s) { pack_rows_of<T>(LatticeOf<decltype(s)>(m), begin, end, dims, dst, ld); });
}
template <class T>
void pack_panel(const Lattice& m, int64_t begin, int64_t end, int64_t dims, T factor, T* dst, int64_t ldd) {
  with_type<T>(
      m.data.dtype, [&](auto s) { pack_panel_of<T>(LatticeOf<decltype(s)>(m), begin, end, dims, factor, dst, ldd); });
}
template <class T>
void unpack_rows(
    const Lattice& m, int64_t begin, int64_t end, int64_t dims, const T* src, int64_t ld, const T* factor,
    int64_t step) {
  with_type<T>(m.data.dtype, [&](auto s) {
    unpack_rows_of<T>(LatticeOf<decltype(s)>(m), begin, end, dims, src, ld, factor, step);
  });
}
template <class T>
void unpack_panel(
    const Lattice& m, int64_t begin, int64_t end, int64_t dims, const T* src, int64_t lds, const T* factor) {
  with_type<T>(
      m.data.dtype, [&](auto s) { unpack_panel_of<T>(LatticeOf<decltype(s)>(m), begin, end, dims, src, lds, factor); });
}

#define MVK_LATTICE(T)                                                                                        \
  template void pack_rows(const Lattice&, int64_t, int64_t, int64_t, T*, int64_t);                            \
  template void pack_panel(const Lattice&, int64_t, int64_t, int64_t, T, T*, int64_t);                        \
  template void unpack_rows(const Lattice&, int64_t, int64_t, int64_t, const T*, int64_t, const T*, int64_t); \
  template void unpack_panel(const Lattice&, int64_t, int64_t, int64_t, const T*, int64_t, const T*);
MVK_LATTICE(float)
MVK_LATTICE(double)

}  // namespace MVK_ISA
}  // namespace mvk
