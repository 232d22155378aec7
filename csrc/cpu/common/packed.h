// Weights of convolutions in panels of columns, as products read them, and the products' way into maps.
#pragma once

#include "common/activate.h"
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

// Prefetches weights into L2 behind the tiles of the product before them, evenly: where there are few rows, weights are what has to
// be read, from L3 or memory.
class NextWeights : public Nothing {
 public:
  // One stretch after the other, during so many tiles.
  NextWeights(int64_t tiles, Stretch first, Stretch second = {})
      : now_(range(first)),
        then_(range(second)),
        share_(tiles ? (first.bytes + second.bytes + tiles - 1) / tiles : 0) {}
  Prefetch in_tile(int64_t K) {
    if (now_.from >= now_.to) {
      if (then_.from >= then_.to) return {};
      now_ = then_, then_ = {};
    }
    // A line in each step at most: of a stretch that is too long for its tiles, the beginning.
    const int64_t even = (share_ + K - 1) / K, step = even < 64 ? even : 64;
    const Prefetch found{now_.from, step};
    now_.from += found.step * K;
    return found;
  }

 private:
  struct Range {
    const char *from, *to;
  };
  static Range range(Stretch s) {
    const char* from = reinterpret_cast<const char*>(s.from);
    return {from, from + s.bytes};
  }
  Range now_, then_;
  int64_t share_;
};

// K rows of a panel, if there are any.
MVK_INLINE Stretch panel_at(const float* weights, int64_t K) { return {weights, K * P * int64_t(sizeof(float))}; }

// Tiles of product_in_parts().
MVK_INLINE int64_t tiles_of(int vectors, int64_t rows, int64_t K) {
  return (rows + rows_of_tile(vectors) - 1) / rows_of_tile(vectors) * ((K + kChain - 1) / kChain);
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

// Rows of pixels in a map, `step` apart.
struct PixelRows {
  float* data;  // null if there is no map
  int64_t step;
  PixelRows at(int64_t channel) const { return {data ? data + channel : nullptr, step}; }
  PixelRows from(int64_t row) const { return at(row * step); }
};

// f of the first V vectors of R rows of a panel, plus those of the residual, into the map: of the last vector `last` channels.
template <Activation f, int R, int V>
MVK_INLINE void put_rows(const float* panel, int last, PixelRows residual, PixelRows out) {
  constexpr int U = R * V;
  vf x[U];
  MVK_EACH x[u] = load<float>(panel + u / V * P + u % V * W<float>);
  activate<f, U>(x);
  MVK_EACH {
    const int64_t at = u % V * W<float>;
    float* to = out.data + u / V * out.step + at;
    const float* plus = residual.data ? residual.data + u / V * residual.step + at : nullptr;
    if (u % V < V - 1 || last == W<float>) {
      store<float>(to, plus ? x[u] + load<float>(plus) : x[u]);
    } else {
      store_partial<float>(to, plus ? x[u] + load_partial<float>(plus, last) : x[u], last);
    }
  }
}

// The same of any rows: four vectors at a time.
template <Activation f, int V>
static void put_vectors(const float* panel, int64_t count, int last, PixelRows residual, PixelRows out) {
  constexpr int R = 4 / V;
  int64_t n = 0;
  for (; n + R <= count; n += R) put_rows<f, R, V>(panel + n * P, last, residual.from(n), out.from(n));
  for (; n < count; ++n) put_rows<f, 1, V>(panel + n * P, last, residual.from(n), out.from(n));
}

// The first `columns` of `count` rows of a panel, activated, plus the residual, into the map.
MVK_INLINE void put_panel(
    Activation activation, float* panel, int64_t count, int64_t columns, PixelRows residual, PixelRows out) {
  const int vectors = columns > W<float> ? 2 : 1, last = int(columns) - (vectors - 1) * W<float>;
  if (residual.data) {
    // By itself: a compiler would fuse Hardswish's product and the sum, in some places and not in others.
    activate_rows(activation, panel, count, vectors, P);
    activation = Activation::identity;
  }
  with_activation(activation, [&](auto known) {
    constexpr Activation f = known();
    const PixelRows plus = f == Activation::identity ? residual : PixelRows{};
    (vectors == 1 ? put_vectors<f, 1> : put_vectors<f, 2>)(panel, count, last, plus, out);
  });
}

}  // namespace
}  // namespace MVK_ISA
}  // namespace mvk
