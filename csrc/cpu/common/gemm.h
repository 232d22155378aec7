// Small matrix products on packed operands, C (+)= A B, in register tiles: rows of A are broadcast, rows of B are vectors.
#pragma once

#include "common/simd.h"

namespace mvk {
namespace MVK_ISA {
namespace {

// Columns of a panel: a tile is two vectors wide.
template <class T>
constexpr int kPanel = 2 * W<T>;

// Rows of a tile: with 16 registers 6 x 2 accumulators, 2 vectors of B and a broadcast; with 32 twice as many.
constexpr int kTileRows = kVectorBytes == 64 ? 12 : 6;
// Rows of a tile V vectors wide; one vector needs as many rows to keep the multipliers busy.
template <int V>
constexpr int kRowsOf = V == 1 ? 12 : 2 * kTileRows / V;

// How n rows are cut into the fewest tiles of at most `most`, nearly equal: 16 as 8 + 8, not as 12 + 4.
struct Tiles {
  int count, height, taller;  // the first `taller` tiles have height + 1 rows
  Tiles(int64_t n, int most) {
    count = (int(n) + most - 1) / most;
    height = count ? int(n) / count : 0;
    taller = int(n) - height * count;
  }
};

enum class Start { zero, from };  // a tile adds to 0 or to what is there

// c[m][n] = (c[m][n] or 0) + sum_k a[m * am + k * ak] * b[k * ldb + n] for M rows and V vectors; am is 1 if Adjacent, else
// ak is. If Top, top[n] becomes at least every c[m][n].
template <class T, int M, int V, bool Adjacent, Start from, bool Top>
static void tile(int64_t K, const T* a, int64_t am, int64_t ak, const T* b, int64_t ldb, T* c, int64_t ldc, T* top) {
  vec<T> acc[M][V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[m][v] = vec<T>{};
  auto step = [&]() __attribute__((always_inline)) {
    vec<T> bv[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) bv[v] = load<T>(b + v * W<T>);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const vec<T> av = splat<T>(Adjacent ? a[m] : a[m * am]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[m][v] += av * bv[v];
    }
    a += Adjacent ? ak : 1;
    b += ldb;
  };
  int64_t k = K;
  for (; k >= 2; k -= 2) {
    step();
    step();
  }
  if (k) step();
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    vec<T> most = Top ? load<T>(top + v * W<T>) : vec<T>{};
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      // What is there is added last: sums of sums err less than one long chain.
      if constexpr (from == Start::from) acc[m][v] += load<T>(c + m * ldc + v * W<T>);
      store<T>(c + m * ldc + v * W<T>, acc[m][v]);
      if constexpr (Top) most = maximum<T>(most, acc[m][v]);
    }
    if constexpr (Top) store<T>(top + v * W<T>, most);
  }
}

template <class T, int V, bool Adjacent, Start from, bool Top, int M>
MVK_INLINE void tile_of(
    int rows, int64_t K, const T* a, int64_t am, int64_t ak, const T* b, int64_t ldb, T* c, int64_t ldc, T* top) {
  if (rows == M) return tile<T, M, V, Adjacent, from, Top>(K, a, am, ak, b, ldb, c, ldc, top);
  if constexpr (M > 1) tile_of<T, V, Adjacent, from, Top, M - 1>(rows, K, a, am, ak, b, ldb, c, ldc, top);
}

// Called between tiles, for work that hides behind them (prefetching).
struct Nothing {
  void between_tiles(int) const {}
};
constexpr Nothing kNothing;

// c (+)= A B for one panel of columns, with A in rows: row m, element k at a[m * lda + k].
template <class T, int V, Start from, bool Top, class Between = const Nothing>
static void product_rows(
    int64_t rows, int64_t K, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, T* top,
    Between& between = kNothing) {
  constexpr int M = kRowsOf<V>;
  const Tiles tiles(rows, M);
  for (int i = 0; i < tiles.count; ++i) {
    const int r = tiles.height + (i < tiles.taller);
    tile_of<T, V, false, from, Top, M>(r, K, a, lda, 1, b, ldb, c, ldc, top);
    a += r * lda, c += r * ldc;
    between.between_tiles(tiles.count);
  }
}

// The same with K in parts of at most kChain products, since sums of sums err less than one long chain. Starts from what is
// there if `from`.
constexpr int64_t kChain = 64;
template <class T, int V, bool Top, class Between = const Nothing>
static void product_in_parts(
    bool from, int64_t rows, int64_t K, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, T* top,
    Between& between = kNothing) {
  const int64_t parts = (K + kChain - 1) / kChain, step = (K + parts - 1) / parts;
  for (int64_t k = 0; k < K; k += step, from = true) {
    const int64_t some = K - k < step ? K - k : step;
    const T* ak = a + k;
    const T* bk = b + k * ldb;
    if (k + step < K) {
      if (from)
        product_rows<T, V, Start::from, false>(rows, some, ak, lda, bk, ldb, c, ldc, nullptr, between);
      else
        product_rows<T, V, Start::zero, false>(rows, some, ak, lda, bk, ldb, c, ldc, nullptr, between);
    } else if (from) {
      product_rows<T, V, Start::from, Top>(rows, some, ak, lda, bk, ldb, c, ldc, top, between);
    } else {
      product_rows<T, V, Start::zero, Top>(rows, some, ak, lda, bk, ldb, c, ldc, top, between);
    }
  }
}

// product_rows for A transposed and cut into tall panels, one for each tile (see pack_tall): panel i of r rows starts at
// K * (rows before it) + i * W, and has row m, element k at [k * r + m].
template <class T, int V, Start from>
static void product_tall(
    const Tiles& tiles, int64_t K, int64_t k0, int64_t k1, const T* a, const T* b, int64_t ldb, T* c, int64_t ldc) {
  for (int i = 0; i < tiles.count; ++i) {
    const int r = tiles.height + (i < tiles.taller);
    tile_of<T, V, true, from, false, kTileRows>(r, k1 - k0, a + k0 * r, 1, r, b, ldb, c, ldc, static_cast<T*>(nullptr));
    a += r * K + W<T>, c += r * ldc;
  }
}

// c (+)= A B with A given by its columns: row m, element k at a[k * lda + m]. `cols` is rounded up to whole vectors, which b
// and c must have.
template <class T, Start from>
static void product_columns(
    int64_t rows, int64_t cols, int64_t K, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc) {
  auto panel = [&](auto width, int64_t col) {
    constexpr int V = decltype(width)::value, M = kRowsOf<V>;
    const Tiles tiles(rows, M);
    int64_t m = 0;
    for (int i = 0; i < tiles.count; ++i) {
      const int r = tiles.height + (i < tiles.taller);
      tile_of<T, V, true, from, false, M>(
          r, K, a + m, 1, lda, b + col, ldb, c + m * ldc + col, ldc, static_cast<T*>(nullptr));
      m += r;
    }
  };
  int64_t col = 0, left = (cols + W<T> - 1) / W<T>;
  if (left % 2 && left > 1) panel(std::integral_constant<int, 3>{}, col), col += 3 * W<T>, left -= 3;
  for (; left >= 2; left -= 2) panel(std::integral_constant<int, 2>{}, col), col += 2 * W<T>;
  if (left) panel(std::integral_constant<int, 1>{}, col);
}

}  // namespace
}  // namespace MVK_ISA
}  // namespace mvk
