// Copies of maps in rows: blocks of a vector of pixels by a vector of dims are transposed in registers, each element is read once and
// written once.
#include "common/map_rows.h"

#include "common/lattice.h"

namespace mvk {
namespace MVK_ISA {
namespace {

// f(pixels of a unit in the map, how many, dims, rows), for a few dims after the others: as many as the processor follows as streams.
template <class T, class F>
static void each_block(const MapRows& a, int64_t begin, int64_t end, const F& f) {
  int64_t table[MapRows::kPixels];
  const int64_t blocks = a.blocks(), pixels = a.H * a.W;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t item = unit / blocks, n = unit % blocks * MapRows::kPixels;
    const int64_t count = pixels - n < MapRows::kPixels ? pixels - n : MapRows::kPixels;
    HeadPixels head(a.dtype, a.map, item / a.heads, item % a.heads, a.H, a.W, table);
    Lattice m = head.lattice(n, count);
    T* rows = static_cast<T*>(a.rows) + (item * pixels + n) * a.ld;
    for (int64_t d = 0; d < a.dims; d += W<T>, rows += W<T>, m.data = m.data + W<T> * m.d)
      f(m, count, a.dims - d < W<T> ? a.dims - d : W<T>, rows);
  }
}

template <class T>
static void take(const MapRows& a, int64_t begin, int64_t end) {
  each_block<T>(a, begin, end, [&](const Lattice& m, int64_t count, int64_t dims, T* rows) {
    pack_rows<T>(m, 0, count, dims, rows, a.ld);
  });
}

template <class T>
static void put(const MapRows& a, int64_t begin, int64_t end) {
  const T one = 1;
  each_block<T>(a, begin, end, [&](const Lattice& m, int64_t count, int64_t dims, const T* rows) {
    unpack_rows<T>(m, 0, count, dims, rows, a.ld, &one, 0);
  });
}

}  // namespace

extern const MapRowsKernels map_rows_kernels;
const MapRowsKernels map_rows_kernels = {by_dtype<take<float>, take<double>>, by_dtype<put<float>, put<double>>};

}  // namespace MVK_ISA
}  // namespace mvk
