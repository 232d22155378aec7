// What the kernels of ReLU linear attention are made of: blocks of pixels in registers' order, and products over them.
//
// The sums of a head are rows: kv[j][i] = sum_n v_j[n] relu(k_i[n]), and row D is the sum of relu(k) itself, as if the values had one
// more dim that is 1 everywhere. Maps whose pixels lie side by side are computed with pixels as lanes, those whose dims do with
// dims as lanes; other strides are packed into one of the two.
#pragma once

#include "common/lattice.h"
#include "common/linear_attention.h"
#include "common/transpose.h"

namespace mvk {
namespace MVK_ISA {

// One (batch, head) of a map, by blocks of pixels.
template <class T>
struct Head : HeadPixels {
  int64_t dims;
  bool rows;  // whether pixels are side by side

  Head(DType dtype, const Map& m, int64_t b, int64_t h, int64_t dims, int64_t height, int64_t width, int64_t* table)
      : HeadPixels(dtype, m, b, h, height, width, table), dims(dims), rows(m.x == 1 && uniform) {}
  // Of rows in scratch that hold pixels from `first` on.
  Head(const T* rows, int64_t ld, int64_t dims, int64_t first, int64_t* table)
      : HeadPixels(kOwn<T>, {const_cast<T*>(rows), 0, 0, ld, 1, 1}, 0, 0, 1, 1, table), dims(dims), rows(true) {
    this->first = first;
  }
  // dst[d * ld + i] = pixel n + i, dim d, or its relu; lanes up to a whole vector are 0.
  void panel(bool rectified, int64_t n, int64_t count, T* dst, int64_t ld);
  // dst[i * ld + d] = pixel n + i, dim d, or its relu; columns up to a whole vector are 0.
  void tokens(bool rectified, int64_t n, int64_t count, T* dst, int64_t ld);
  // The same back into the map.
  void put_panel(int64_t n, int64_t count, const T* src, int64_t ld);
  void put_tokens(int64_t n, int64_t count, const T* src, int64_t ld);

  // Rows of pixels, or of a pixel's dims, where they lie, or null.
  const T* panel_in_place(int64_t n) const { return rows ? (base + at(n)).template own<T>() : nullptr; }
  const T* tokens_in_place(int64_t n) const { return last && uniform ? (base + at(n)).template own<T>() : nullptr; }
  // Where whole vectors can be written in place, or null.
  T* in_place_panel(int64_t n, int64_t count) const {
    return rows && count % W<T> == 0 ? (base + at(n)).template own<T>() : nullptr;
  }
  T* in_place_tokens(int64_t n) const {
    return last && uniform && dims % W<T> == 0 ? (base + at(n)).template own<T>() : nullptr;
  }
};

// Prefetches into L2, between the tiles of a product, what is read or written after it: heads of a map are far apart, and the hardware
// does not guess them.
struct Next : Nothing {
  struct Lines {
    const char* at;
    int64_t stride, bytes, left, share;
  } some[4];
  int maps = 0;
  int64_t panels = 1;
  bool begun = false;
  template <class T>
  void add(const Head<T>& head, int64_t n, int64_t count) {
    if (count <= 0) return;
    const char* base = (head.base + head.at(n)).data;
    const int64_t size = head.base.size();
    if (head.rows)
      some[maps++] = {base, head.map.d * size, count * size, head.dims};
    else if (head.last && head.uniform)
      some[maps++] = {base, head.map.x * size, head.dims * size, count};
  }
  void expect(int64_t some) { panels = some; }
  // A share of the rows, for one of so many tiles of each panel.
  void between_tiles(int tiles) {
    if (!begun)
      for (int i = 0; i < maps; ++i) some[i].share = (some[i].left + tiles * panels - 1) / (tiles * panels);
    begun = true;
    for (int i = 0; i < maps; ++i) {
      Lines& m = some[i];
      const int64_t share = m.share < m.left ? m.share : m.left;
      m.left -= share;
      for (int64_t r = 0; r < share; ++r, m.at += m.stride)
        for (int64_t b = 0; b < m.bytes; b += 64) __builtin_prefetch(m.at + b, 0, 2);
    }
  }
};

// dst[n * ldd + i] = src[i * lds + n] for `count` pixels, whole vectors of them in src, and whole vectors of dims in dst.
template <class T>
void turn(int64_t dims, int64_t count, const T* src, int64_t lds, T* dst, int64_t ldd);

namespace {

// A gradient through relu, given its result: as PyTorch, NaN lets it pass.
template <class T>
MVK_INLINE vec<T> where_positive(vec<T> result, vec<T> gradient) {
  return result <= vec<T>{} ? vec<T>{} : gradient;
}

// to[n] = 1 / (sum_i keys[i] q[i * ld + n] + eps) for V vectors of pixels.
template <class T, int V>
MVK_INLINE void reciprocals(int64_t D, const T* keys, const T* q, int64_t ld, T eps, T* to) {
  vec<T> sum[2][V];  // two chains
  for (auto& half : sum)
    for (auto& one : half) one = vec<T>{};
  int64_t i = 0;
  for (; i + 2 <= D; i += 2, q += 2 * ld)
#pragma GCC unroll 2
    for (int u = 0; u < 2; ++u)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[u][v] += splat(keys[i + u]) * load<T>(q + u * ld + v * W<T>);
  for (int v = 0; v < V; ++v) {
    if (i < D) sum[0][v] += splat(keys[i]) * load<T>(q + v * W<T>);
    store<T>(to + v * W<T>, splat(T(1)) / (sum[0][v] + sum[1][v] + splat(eps)));
  }
}

// to[n] = sum_i a[n * lda + i] b[n * ldb + i] for up to W rows of whole vectors; b's step is 0 for one row for all.
template <class T>
MVK_INLINE vec<T> dots(int count, int64_t cols, const T* a, int64_t lda, const T* b, int64_t ldb) {
  vec<T> sum[W<T>];
#pragma GCC unroll 16
  for (int n = 0; n < W<T>; ++n) {
    sum[n] = vec<T>{};
    if (n < count)
      for (int64_t i = 0; i < cols; i += W<T>) sum[n] += load<T>(a + n * lda + i) * load<T>(b + n * ldb + i);
  }
  add_across<T>(sum);
  return sum[0];
}

// [D + 1][ld] in scratch from kv (D, D) and keys (D), and back.
template <class T>
static void take_sums(int64_t D, const T* kv, const T* keys, T* to, int64_t ld) {
  for (int64_t j = 0; j <= D; ++j, to += ld) {
    memcpy(to, j < D ? kv + j * D : keys, D * sizeof(T));
    for (int64_t i = D; i < ld; ++i) to[i] = 0;
  }
}
template <class T>
static void give_sums(int64_t D, const T* from, int64_t ld, T* kv, T* keys) {
  for (int64_t j = 0; j <= D; ++j) memcpy(j < D ? kv + j * D : keys, from + j * ld, D * sizeof(T));
}
// The sums of all chunks, `stride` apart, in order.
template <class T>
static void merge_sums(int64_t D, int64_t chunks, const T* parts, int64_t stride, T* to, int64_t ld) {
  take_sums(D, parts, parts + D * D, to, ld);
  for (int64_t c = 1; c < chunks; ++c)
    for (int64_t j = 0; j <= D; ++j)
      for (int64_t i = 0; i < D; ++i) to[j * ld + i] += parts[c * stride + j * D + i];
}

// Pixels of a block: two maps of it in 24 KB, a half of L1 at the least.
template <class T>
MVK_INLINE int64_t pixels_of_block(int64_t D, int64_t pixels) {
  constexpr int64_t unit = 2 * W<T>;
  int64_t fit = (24 << 10) / (2 * D * int64_t(sizeof(T))) / unit * unit;
  fit = fit < unit ? unit : fit > 256 ? 256 : fit;
  const int64_t all = round_up(pixels, W<T>);
  return fit < all ? fit : all;
}

}  // namespace
}  // namespace MVK_ISA
}  // namespace mvk
