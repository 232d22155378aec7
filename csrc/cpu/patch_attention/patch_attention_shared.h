// What the forward and the backward of patch attention share.
//
// Everything is computed transposed, with queries as vector lanes and keys as rows: softmax then needs no sums
// across lanes and no masks for the last keys, and no head_dim is padded.
#pragma once

#include "common/softmax.h"
#include "patch_attention/groups.h"

namespace mvk {
namespace MVK_ISA {
namespace {

constexpr int64_t kBlock = PatchAttention::kBlock;

// The size of the parts when n is cut into the fewest parts of at most `most`.
MVK_INLINE int64_t part(int64_t n, int64_t most) {
  if (n <= most) return n ? n : 1;
  const int64_t parts = (n + most - 1) / most;
  return (n + parts - 1) / parts;
}

// The rows of a group's N that a chunk of a unit has.
MVK_INLINE void rows_of_chunk(const PatchAttention& a, int64_t N, int64_t chunk, int64_t& begin, int64_t& end) {
  const int64_t blocks = (N + kBlock - 1) / kBlock;
  begin = blocks * chunk / a.chunks * kBlock, end = blocks * (chunk + 1) / a.chunks * kBlock;
  if (end > N) end = N;
}

// Whether C = A B for N rows, whose head dims fill vectors, costs less than C^T = B^T A^T, whose rows do: multiplications by the
// vector, and what packing B in tall panels and transposing one of the two into the map takes. `last` if the map's dims
// are contiguous.
template <class T>
static bool rows_are_cheaper(int64_t N, int64_t dims, bool last) {
  const int64_t vectors = (dims + W<T> - 1) / W<T>, panels = (N + W<T> - 1) / W<T>, turn = panels * vectors * 5 * W<T>;
  return N * N * vectors + (last ? 0 : turn) <= N * panels * dims + 2 * N * vectors + (last ? turn : 0);
}

// offset[n] = n * stride, in the arena.
static int64_t* row_offsets(int64_t count, int64_t stride) {
  int64_t* offset = arena.take<int64_t>(count);
  for (int64_t n = 0; n < count; ++n) offset[n] = n * stride;
  return offset;
}

// The (N, N) bias of a head, read as a map whose tokens are the queries and whose dims are the keys.
struct Bias {
  Lattice scores = {};
  Bias(const PatchAttention& a, int64_t h, const int64_t* rows) {
    if (a.bias) scores = {Elements(a.bias, a.dtype) + h * a.bias_stride[0], rows, a.bias_stride[2], a.bias_stride[1]};
  }
  // dst[(key - first) * ld + i] = bias[row + i][key], which the product with the keys is added to.
  template <class T>
  void transposed(int64_t row, int64_t stop, int64_t first, int64_t keys, T* dst, int64_t ld) const {
    const Lattice some = {scores.data + first * scores.d, scores.offset, scores.d, scores.step};
    pack_panel<T>(some, row, stop, keys, T(1), dst, ld);
  }
};

}  // namespace

}  // namespace MVK_ISA
}  // namespace mvk
