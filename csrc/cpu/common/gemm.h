// Small matrix products on packed operands, C (+)= A B, in register tiles: rows of A are broadcast, rows of B are vectors.
// The tiles are compiled once, in gemm.cpp.
#pragma once

#include "common/simd.h"

namespace mvk {
namespace MVK_ISA {

enum class Start { zero, from };  // a product adds to 0 or to what is there
constexpr Start start_if(bool there) { return there ? Start::from : Start::zero; }

// Memory that a tile prefetches into L2 meanwhile: the address that comes next, and how many bytes it moves with each step of k.
// A line at a time, because the processor has room for few lines that are on their way, and waits with all else if they are too many.
struct Prefetch {
  const char* at = nullptr;
  int64_t step = 0;
};

// What is prefetched behind the tiles of a product: between them, or in them, `K` steps long.
struct Nothing {
  void expect(int64_t) const {}  // panels, each with as many tiles
  void between_tiles(int) const {}
  Prefetch in_tile(int64_t) const { return {}; }
};

// What is done to a product as it is stored, in this order; and before that, what is prefetched.
template <class T>
struct End {
  Start start = Start::zero;
  const T* factor = nullptr;  // column n is multiplied by factor[n]
  bool rectified = false;     // relu; NaN stays
  T* top = nullptr;           // top[n] becomes at least every element of column n
  const T* bias = nullptr;    // bias[n] is added to column n
  const T* plus = nullptr;    // plus[m * ldp + n] is added to row m, column n
  int64_t ldp = 0;
  Prefetch prefetch = {};

  End at(int64_t col) const {
    auto from = [&](auto* p) { return p ? p + col : nullptr; };
    return {start, from(factor), rectified, from(top), from(bias), from(plus), ldp, prefetch};
  }
  End below(int64_t row) const {
    End end = *this;
    if (plus) end.plus += row * ldp;
    return end;
  }
};

// c[m][n] = end(sum_k a[m * am + k * ak] * b[k * ldb + n]) for the rows and vectors of a tile; am is 1 if Adjacent, else ak is.
template <class T>
using Tile =
    void(int64_t K, const T* a, int64_t am, int64_t ak, const T* b, int64_t ldb, T* c, int64_t ldc, const End<T>& end);

// For 1, 2, 3 and 4 vectors the tiles so wide, by their rows: that of 1 row comes first.
template <class T, bool Adjacent>
struct TilesByWidth {
  static Tile<T>* const* const of[4];
};

namespace {

// Columns of a panel: a tile is two vectors wide.
template <class T>
constexpr int kPanel = 2 * W<T>;

// Rows of a tile: with 16 registers 6 x 2 accumulators, 2 vectors of B and a broadcast; with 32 twice as many. NEON has 32, but
// GCC loads ahead of the multiplications, and spills above 8 rows; 16 chains fill four pipes.
#if defined(__aarch64__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = kVectorBytes == 64 ? 12 : 6;
#endif
// Rows of a tile so many vectors wide; one vector needs as many rows to keep the multipliers busy.
constexpr int rows_of_tile(int vectors) { return vectors == 1 ? 12 : 2 * kTileRows / vectors; }

// How n rows are cut into the fewest tiles of at most `most`, nearly equal: 16 as 8 + 8, not as 12 + 4.
struct Tiles {
  int count, height, taller;  // the first `taller` tiles have height + 1 rows
  Tiles(int64_t n, int most) : count(n > 0), height(int(n)), taller(0) {
    if (n <= most) return;  // most often: divisions take as long as a small tile
    count = (int(n) + most - 1) / most;
    height = int(n) / count;
    taller = int(n) - height * count;
  }
  // f(rows, the first of them) for each tile.
  template <class F>
  __attribute__((always_inline)) void each(const F& f) const {
    int64_t first = 0;
    for (int i = 0; i < count; ++i) {
      const int rows = height + (i < taller);
      f(rows, first);
      first += rows;
    }
  }
};

constexpr Nothing kNothing;

// One panel of columns, with A in rows: row m, element k at a[m * lda + k].
template <class T, class Between = const Nothing>
static void product_rows(
    int vectors, int64_t rows, int64_t K, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc,
    const End<T>& end, Between& between = kNothing) {
  const Tiles tiles(rows, rows_of_tile(vectors));
  Tile<T>* const* tile = TilesByWidth<T, false>::of[vectors - 1] - 1;
  tiles.each([&](int r, int64_t m) {
    End<T> here = end.below(m);
    here.prefetch = between.in_tile(K);
    tile[r](K, a + m * lda, lda, 1, b, ldb, c + m * ldc, ldc, here);
    between.between_tiles(tiles.count);
  });
}

// The same with K in parts of at most kChain products, since sums of sums err less than one long chain.
constexpr int64_t kChain = 128;
template <class T, class Between = const Nothing>
static void product_in_parts(
    int vectors, int64_t rows, int64_t K, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc,
    const End<T>& end, Between& between = kNothing) {
  const int64_t parts = (K + kChain - 1) / kChain, step = (K + parts - 1) / parts;
  End<T> sums{end.start}, last = end;
  int64_t k = 0;
  for (; k + step < K; k += step) {
    product_rows(vectors, rows, step, a + k, lda, b + k * ldb, ldb, c, ldc, sums, between);
    sums.start = last.start = Start::from;
  }
  product_rows(vectors, rows, K - k, a + k, lda, b + k * ldb, ldb, c, ldc, last, between);
}

// One panel, with A transposed and cut into tall panels, one for each tile (see pack_tall): panel i of r rows starts at
// K * (rows before it) + i * W, and has row m, element k at [k * r + m]. Sums over k0 .. k1.
template <class T>
static void product_tall(
    int vectors, const Tiles& tiles, int64_t K, int64_t k0, int64_t k1, const T* a, const T* b, int64_t ldb, T* c,
    int64_t ldc, const End<T>& end) {
  Tile<T>* const* tile = TilesByWidth<T, true>::of[vectors - 1] - 1;
  tiles.each([&](int r, int64_t m) {
    tile[r](k1 - k0, a + k0 * r, 1, r, b, ldb, c + m * ldc, ldc, end);
    a += r * K + W<T>;
  });
}

// panel(vectors, col) for the panels that `cols` columns, rounded up to whole vectors, are cut into.
template <class T, class Panel>
MVK_INLINE void by_panels(int64_t cols, const Panel& panel) {
  int64_t col = 0, left = (cols + W<T> - 1) / W<T>;
  auto take = [&](int vectors) {
    panel(vectors, col);
    col += vectors * W<T>, left -= vectors;
  };
  if (left % 2 && left > 1) take(3);
  while (left >= 2) take(2);
  if (left) take(1);
}

// All columns, with A in rows; b and c have whole vectors.
template <class T, class Between = const Nothing>
static void product(
    int64_t rows, int64_t cols, int64_t K, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc,
    const End<T>& end, Between& between = kNothing) {
  const int64_t whole = (cols + W<T> - 1) / W<T>;  // vectors; by_panels() takes three at once if they are odd
  between.expect(whole < 2 ? whole : whole / 2);
  by_panels<T>(cols, [&](int vectors, int64_t col) {
    product_rows(vectors, rows, K, a, lda, b + col, ldb, c + col, ldc, end.at(col), between);
  });
}

// The same with A given by its columns: row m, element k at a[k * lda + m].
template <class T>
static void product_columns(
    int64_t rows, int64_t cols, int64_t K, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc,
    const End<T>& end) {
  by_panels<T>(cols, [&](int vectors, int64_t col) {
    const Tiles tiles(rows, rows_of_tile(vectors));
    Tile<T>* const* tile = TilesByWidth<T, true>::of[vectors - 1] - 1;
    const End<T> here = end.at(col);
    tiles.each([&](int r, int64_t m) { tile[r](K, a + m, 1, lda, b + col, ldb, c + m * ldc + col, ldc, here); });
  });
}

}  // namespace
}  // namespace MVK_ISA
}  // namespace mvk
