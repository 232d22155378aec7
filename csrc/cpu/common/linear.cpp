// Blocks of pixels of a head into scratch and back, for each type that a map's elements can have.
#include "common/linear.h"

#include "common/blocks.h"
#include "common/transpose.h"

namespace mvk {
namespace MVK_ISA {
namespace {

template <class T, bool Rectified>
static void panel_of(Head<T>& head, int64_t n, int64_t count, T* dst, int64_t ld) {
  const int64_t dims = head.dims, step = head.map.d;
  if (head.rows) {
    with_type<T>(head.base.dtype, [&](auto type) {
      const auto* from = (head.base + head.at(n)).template as<decltype(type)>();
      for (int64_t d = 0; d < dims; ++d) take_row<T, Rectified>(from + d * step, count, dst + d * ld);
    });
    return;
  }
  pack_panel<T>(head.lattice(n, count), 0, count, dims, T(1), dst, ld);
  if constexpr (Rectified)
    for (int64_t d = 0; d < dims; ++d)
      for (int64_t i = 0; i < count; i += W<T>) store<T>(dst + d * ld + i, relu<T>(load<T>(dst + d * ld + i)));
}

template <class T, bool Rectified, class S>
static void transposed_tokens(Head<T>& head, int64_t n, int64_t count, T* dst, int64_t ld) {
  const int64_t dims = head.dims, step = head.map.d;
  const bool rows = head.rows;
  const LatticeOf<S> all(head.lattice(n, count));
  vec<T> block[W<T>];
  auto turn_block = [&](int64_t i, int64_t d) __attribute__((always_inline)) {
    const int some = at_most<T>(count - i);
    T* to = dst + i * ld + d;
    if (rows && some == W<T> && d + W<T> <= dims) {
      const S* p = all.data + d * step + i;
#pragma GCC unroll 16
      for (int j = 0; j < W<T>; ++j) block[j] = act<T, Rectified>(load<T>(p + j * step));
      transpose<T>(block);
#pragma GCC unroll 16
      for (int j = 0; j < W<T>; ++j) store<T>(to + j * ld, block[j]);
    } else {
      load_by_dim<T>(all, i, some, d, at_most<T>(dims - d), block);
      for (int j = 0; j < W<T>; ++j) block[j] = act<T, Rectified>(block[j]);
      transpose<T>(block);
      for (int j = 0; j < some; ++j) store<T>(to + j * ld, block[j]);
    }
  };
  // A whole cache line of each row (of float32, half a line of half types) before the next rows: those of a map whose sides are powers
  // of two all fall into one set.
  constexpr int64_t line = kVectorBytes < 64 ? 64 / kVectorBytes * W<T> : W<T>;
  for (int64_t i = 0; i < count; i += line)
    for (int64_t d = 0; d < dims; d += W<T>)
      for (int64_t k = i; k < i + line && k < count; k += W<T>) turn_block(k, d);
}

template <class T, bool Rectified>
static void tokens_of(Head<T>& head, int64_t n, int64_t count, T* dst, int64_t ld) {
  with_type<T>(head.base.dtype, [&](auto type) {
    using S = decltype(type);
    if (!head.last) return transposed_tokens<T, Rectified, S>(head, n, count, dst, ld);
    const S* base = head.base.template as<S>();
    const int64_t dims = head.dims;
    for (int64_t i = 0; i < count; ++i) take_row<T, Rectified>(base + head.at(n + i), dims, dst + i * ld);
  });
}

}  // namespace

template <class T>
void Head<T>::panel(bool rectified, int64_t n, int64_t count, T* dst, int64_t ld) {
  return rectified ? panel_of<T, true>(*this, n, count, dst, ld) : panel_of<T, false>(*this, n, count, dst, ld);
}
template <class T>
void Head<T>::tokens(bool rectified, int64_t n, int64_t count, T* dst, int64_t ld) {
  return rectified ? tokens_of<T, true>(*this, n, count, dst, ld) : tokens_of<T, false>(*this, n, count, dst, ld);
}
template <class T>
void Head<T>::put_panel(int64_t n, int64_t count, const T* src, int64_t ld) {
  if (!rows) return unpack_panel<T>(lattice(n, count), 0, count, dims, src, ld);
  with_type<T>(base.dtype, [&](auto type) {
    auto* to = (base + at(n)).template as<decltype(type)>();
    for (int64_t d = 0, step = map.d, some = dims; d < some; ++d, to += step, src += ld) {
      int64_t i = 0;
      for (; i + W<T> <= count; i += W<T>) store_as<T>(to + i, load<T>(src + i));
      if (i < count) store_partial<T>(to + i, load<T>(src + i), int(count - i));
    }
  });
}
template <class T>
void Head<T>::put_tokens(int64_t n, int64_t count, const T* src, int64_t ld) {
  const T one = 1;
  unpack_rows<T>(lattice(n, count), 0, count, dims, src, ld, &one, 0);
}

template <class T>
void turn(int64_t dims, int64_t count, const T* src, int64_t lds, T* dst, int64_t ldd) {
  vec<T> block[W<T>];
  for (int64_t n = 0; n < count; n += W<T>) {
    for (int64_t d = 0; d < dims; d += W<T>) {
      const int some = at_most<T>(dims - d);
      const T* from = src + d * lds + n;
      if (some == W<T>) {
#pragma GCC unroll 16
        for (int j = 0; j < W<T>; ++j) block[j] = load<T>(from + j * lds);
      } else {
        for (int j = 0; j < W<T>; ++j) block[j] = j < some ? load<T>(from + j * lds) : vec<T>{};
      }
      transpose<T>(block);
      T* to = dst + n * ldd + d;
#pragma GCC unroll 16
      for (int j = 0; j < W<T>; ++j) store<T>(to + j * ldd, block[j]);
    }
  }
}

template struct Head<float>;
template struct Head<double>;
template void turn(int64_t, int64_t, const float*, int64_t, float*, int64_t);
template void turn(int64_t, int64_t, const double*, int64_t, double*, int64_t);

}  // namespace MVK_ISA
}  // namespace mvk
