// Reading and writing the pixels of one group of a map, whatever its strides: blocks of W pixels x W dims are
// loaded along the direction that is contiguous in memory and transposed in registers where the other one is wanted.
// Compiled once, in lattice.cpp, for all types of elements.
#pragma once

#include "common/arena.h"
#include "common/elements.h"
#include "common/gemm.h"

namespace mvk {
namespace MVK_ISA {

// The tokens of a group in one map: token n, dim i is element offset[n] + i * d.
struct Lattice {
  Elements data;
  const int64_t* offset;
  int64_t d, step;
};

// One (batch, head) of a map by its pixels, line after line. `table` has room for the pixels of a block.
struct HeadPixels {
  Elements base;
  Map map;
  int64_t width, first = 0;  // first: the pixel that base is
  bool uniform, last;        // whether all pixels are equally far apart; whether dims are side by side
  int64_t* table;
  int64_t known = 0;

  HeadPixels(DType dtype, const Map& m, int64_t b, int64_t h, int64_t height, int64_t width, int64_t* table)
      : base(Elements(m.data, dtype) + (b * m.b + h * m.h)),
        map(m),
        width(width),
        uniform(m.y == width * m.x || height == 1),
        last(m.d == 1),
        table(table) {}
  int64_t at(int64_t n) const {
    n -= first;
    return uniform ? n * map.x : n / width * map.y + n % width * map.x;
  }
  Lattice lattice(int64_t n, int64_t count) {
    if (!uniform) {
      for (int64_t i = 0; i < count; ++i) table[i] = at(n + i) - at(n);
    } else {
      for (; known < count; ++known) table[known] = known * map.x;
    }
    return {base + at(n), table, map.d, map.x};
  }
};

// dst[(n - begin) * ld + d] = token n, dim d; columns up to a whole vector are zero.
template <class T>
void pack_rows(const Lattice& m, int64_t begin, int64_t end, int64_t dims, T* dst, int64_t ld);

// Transposed, V vectors of tokens side by side: dst[d * ldd + i] = factor * token begin + i, dim d. Tokens up to
// whole vectors are zero.
template <class T>
void pack_panel(const Lattice& m, int64_t begin, int64_t end, int64_t dims, T factor, T* dst, int64_t ldd);

// Token begin + i, dim d of the map = factor[i * step] * src[i * ld + d]. src has whole vectors.
template <class T>
void unpack_rows(
    const Lattice& m, int64_t begin, int64_t end, int64_t dims, const T* src, int64_t ld, const T* factor,
    int64_t step);

// Token begin + i, dim d of the map = factor[i] * src[d * lds + i], factor null for 1. src has whole vectors.
template <class T>
void unpack_panel(
    const Lattice& m, int64_t begin, int64_t end, int64_t dims, const T* src, int64_t lds, const T* factor = nullptr);

namespace {

// Rows [count][ld] cut into tall panels: panel i holds dims d0 .. d0 + r of every row, r apart, from dst + count * d0 + i * W.
// Whole vectors are stored, each over the end of the one before it; a panel has W spare elements for the last.
template <class T>
static void pack_tall(const T* rows, int64_t ld, int64_t count, const Tiles& tiles, T* dst) {
  tiles.each([&](int r, int64_t first) {
    for (int64_t n = 0; n < count; ++n)
      for (int d = 0; d < r; d += W<T>) store<T>(dst + n * r + d, load<T>(rows + n * ld + first + d));
    dst += count * r + W<T>;
  });
}
template <class T>
int64_t tall_size(int64_t count, int64_t dims) {
  return (count + W<T>)*dims + W<T>;
}

}  // namespace
}  // namespace MVK_ISA
}  // namespace mvk
