// Weights of convolutions in panels of columns, as products read them.
#pragma once

#include "common/arena.h"
#include "common/gemm.h"

namespace mvk {
namespace MVK_ISA {
namespace {

constexpr int64_t P = kPanel<float>;

// What packed weights begin with, and zeros in what this instruction set leaves unused: the same weights have the same bits.
template <class Sizes>
MVK_INLINE void pack_sizes(const Sizes& s, float* packed) {
  static_assert(sizeof s <= kPackedHeader * sizeof(float));
  memset(packed, 0, kPackedHeader * sizeof(float));
  memset(packed + s.end(), 0, (packed_count(s) - s.end()) * sizeof(float));
  memcpy(packed, &s, sizeof s);
}
// [column][row] of a (columns, rows) matrix as [panel][row][column]; columns that fill the last panel are 0.
MVK_INLINE void pack_panels(const float* from, int64_t columns, int64_t rows, float* to) {
  for (int64_t first = 0; first < columns; first += P, to += rows * P)
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < P; ++i) to[row * P + i] = first + i < columns ? from[(first + i) * rows + row] : 0;
}
MVK_INLINE void pack_bias(const float* from, int64_t columns, float* to) {
  for (int64_t i = 0; i < round_up(columns, P); ++i) to[i] = from && i < columns ? from[i] : 0;
}

// How many of the vectors of a panel hold some of the channels.
MVK_INLINE int vectors_of(int64_t channels, int64_t panel) { return channels - panel * P > W<float> ? 2 : 1; }

// The channels of a pixel from scratch memory, which has whole vectors, into a map, added to those at `plus` if it is not null.
MVK_INLINE void put_channels(const float* values, int64_t count, const float* plus, float* to) {
  int64_t c = 0;
  for (; c + W<float> <= count; c += W<float>) {
    vec<float> v = load<float>(values + c);
    if (plus) v += load<float>(plus + c);
    store<float>(to + c, v);
  }
  if (c == count) return;
  vec<float> v = load<float>(values + c);
  if (plus) v += load_partial<float>(plus + c, int(count - c));
  store_partial<float>(to + c, v, int(count - c));
}

}  // namespace
}  // namespace MVK_ISA
}  // namespace mvk
