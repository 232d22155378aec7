// What the forward and the backward of attention inside groups share.
//
// Everything is computed transposed, with queries as vector lanes and keys as rows: softmax then needs no sums
// across lanes and no masks for the last keys, and no head_dim is padded.
#pragma once

#include "common/attention_groups.h"
#include "common/softmax.h"

namespace mvk {
namespace MVK_ISA {
namespace {

constexpr int64_t kBlock = Attention::kBlock;

// The size of the parts when n is cut into the fewest parts of at most `most`.
MVK_INLINE int64_t part(int64_t n, int64_t most) {
  if (n <= most) return n ? n : 1;
  const int64_t parts = (n + most - 1) / most;
  return (n + parts - 1) / parts;
}

// The rows of a group's N queries that a chunk of a unit has.
MVK_INLINE void rows_of_chunk(const Attention& a, int64_t N, int64_t chunk, int64_t& begin, int64_t& end) {
  const int64_t blocks = (N + kBlock - 1) / kBlock;
  begin = blocks * chunk / a.chunks * kBlock, end = blocks * (chunk + 1) / a.chunks * kBlock;
  if (end > N) end = N;
}

// Whether C = A B for N rows and M products in each sum, whose head dims fill vectors, costs less than C^T = B^T A^T, whose rows do:
// multiplications by the vector, and what packing B in tall panels and transposing one of the two into the map takes.
// `last` if the map's dims are contiguous.
template <class T>
static bool rows_are_cheaper(int64_t N, int64_t M, int64_t dims, bool last) {
  const int64_t vectors = (dims + W<T> - 1) / W<T>, panels = (N + W<T> - 1) / W<T>, turn = panels * vectors * 5 * W<T>;
  return N * M * vectors + (last ? 0 : turn) <= M * panels * dims + 2 * M * vectors + (last ? turn : 0);
}

// Which places of a whole group the pixels of a group have: pixel (i, j) of the group has first + i * line + j.
struct Places {
  int64_t first, line, wide;
  Places(const Axis& x, const Pixels& p) : first(p.y.place * x.places + p.x.place), line(x.places), wide(p.x.count) {}
  // f(pixel, place, count) for runs of pixels side by side among begin .. end, whose places are side by side too.
  template <class F>
  __attribute__((always_inline)) void runs(int64_t begin, int64_t end, const F& f) const {
    if (wide == line) return f(begin, first + begin, end - begin);
    for (int64_t n = begin; n < end;) {
      const int64_t i = n / wide, j = n % wide, count = wide - j < end - n ? wide - j : end - n;
      f(n, first + i * line + j, count);
      n += count;
    }
  }
};

// The bias of a head for the pixels of a group, read as a map whose tokens are the queries and whose dims are the keys.
struct Bias {
  Lattice scores = {};
  Places keys;
  Bias(const Attention& a, const Group& g, Offsets& rows) : keys(a.key_x, g.keys) {
    if (!a.bias) return;
    const int64_t step = a.bias_stride[1];
    const Elements head = Elements(a.bias, a.bias_dtype) + g.h * a.bias_stride[0];
    scores = {
        head + Places(a.x, g.queries).first * step, rows.of(g.queries, a.x.places * step, step), a.bias_stride[2],
        step};
  }
  // dst[(key - first) * ld + i] = bias[row + i][key], which the product with the keys is added to.
  template <class T>
  void transposed(int64_t row, int64_t stop, int64_t first, int64_t count, T* dst, int64_t ld) const {
    keys.runs(first, first + count, [&](int64_t key, int64_t place, int64_t some) {
      const Lattice run = {scores.data + place * scores.d, scores.offset, scores.d, scores.step};
      pack_panel<T>(run, row, stop, some, T(1), dst + (key - first) * ld, ld);
    });
  }
};

}  // namespace

}  // namespace MVK_ISA
}  // namespace mvk
