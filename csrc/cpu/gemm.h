// Small matrix products on packed operands: C (+)= A B, with C and B in row panels of two vectors.
#pragma once

#include "simd.h"

namespace mvk {
namespace MVK_ISA {
namespace {

// Columns of a panel.
template <class T>
constexpr int kPanel = 2 * W<T>;

// Rows of a register tile: with 16 registers 6 x 2 accumulators, 2 vectors of B and a broadcast; with 32
// registers twice as many.
constexpr int kTileRows = kVectorBytes == 64 ? 12 : 6;
// A tile one vector wide is as many rows high as it has accumulators.
constexpr int kNarrowRows = 12;

// C[m][n] (+)= sum_k a[m * am + k * ak] * b[k * ldb + n] for M rows and V vectors.
template <class T, int M, int V, bool Accumulate>
static void tile(int64_t K, const T* a, int64_t am, int64_t ak, const T* b, int64_t ldb, T* c, int64_t ldc) {
  vec<T> acc[M][V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[m][v] = Accumulate ? load<T>(c + m * ldc + v * W<T>) : vec<T>{};
  for (int64_t k = 0; k < K; ++k) {
    vec<T> bv[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) bv[v] = load<T>(b + v * W<T>);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      vec<T> av = splat<T>(a[m * am]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[m][v] += av * bv[v];
    }
    a += ak;
    b += ldb;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store<T>(c + m * ldc + v * W<T>, acc[m][v]);
}

template <class T, int V, bool Accumulate, int M>
MVK_INLINE void tile_of(
    int rows, int64_t K, const T* a, int64_t am, int64_t ak, const T* b, int64_t ldb, T* c, int64_t ldc) {
  if (rows == M) return tile<T, M, V, Accumulate>(K, a, am, ak, b, ldb, c, ldc);
  if constexpr (M > 1) tile_of<T, V, Accumulate, M - 1>(rows, K, a, am, ak, b, ldb, c, ldc);
}

template <class T, int V, bool Accumulate, int M>
MVK_INLINE void column(
    int64_t rows, int64_t K, const T* a, int64_t am, int64_t ak, const T* b, int64_t ldb, T* c, int64_t ldc) {
  // Tiles of nearly equal height: 16 rows as 8 + 8, not as 12 + 4.
  int64_t tiles = (rows + M - 1) / M;
  for (int64_t done = 0; tiles; --tiles) {
    int64_t m = (rows - done + tiles - 1) / tiles;
    tile_of<T, V, Accumulate, M>(int(m), K, a + done * am, am, ak, b, ldb, c + done * ldc, ldc);
    done += m;
  }
}

// B's columns come in panels of kPanel: column n, row k at b[(n / kPanel) * panel + k * ldb + n % kPanel].
// Writes whole vectors: C has room for cols rounded up to a vector.
template <class T, bool Accumulate>
static void gemm(
    int64_t rows, int64_t cols, int64_t K, const T* a, int64_t am, int64_t ak, const T* b, int64_t ldb,
    int64_t panel, T* c, int64_t ldc) {
  for (; cols > W<T>; cols -= kPanel<T>, b += panel, c += kPanel<T>)
    column<T, 2, Accumulate, kTileRows>(rows, K, a, am, ak, b, ldb, c, ldc);
  if (cols > 0) column<T, 1, Accumulate, kNarrowRows>(rows, K, a, am, ak, b, ldb, c, ldc);
}

}  // namespace
}  // namespace MVK_ISA
}  // namespace mvk
