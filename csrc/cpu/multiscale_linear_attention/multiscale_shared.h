// The convolutions of one head of a scale, by bands of rows that stay in cache.
#pragma once

#include "common/depthwise.h"
#include "common/linear_stages.h"
#include "multiscale_linear_attention/multiscale.h"

namespace mvk {
namespace MVK_ISA {
namespace {

struct Part {
  int64_t item, b, h, chunk, y0, y1;  // the unit, and the rows of the map that its chunk is
  Part(const Multiscale& a, int64_t unit)
      : item(unit / a.chunks),
        b(item / a.heads),
        h(item % a.heads),
        chunk(unit % a.chunks),
        y0(a.H * chunk / a.chunks),
        y1(a.H * (chunk + 1) / a.chunks) {}
};

// The rows y0 .. y1 in the fewest bands of about 512 pixels, nearly equal.
struct Bands {
  int64_t y, end, rows;
  Bands(const Multiscale& a, const Part& part) : y(part.y0), end(part.y1), rows(height(a)) {
    const int64_t count = (end - y + rows - 1) / rows;
    if (count) rows = (end - y + count - 1) / count;
  }
  static int64_t height(const Multiscale& a) {
    const int64_t fit = 512 / a.W;
    return fit < 1 ? 1 : fit < a.H ? fit : a.H;
  }
  bool next(int64_t& y0, int64_t& y1) {
    y0 = y, y = y1 = end - y < rows ? end : y + rows;
    return y0 < y1;
  }
};

template <class T>
MVK_INLINE int64_t band_ld(const Multiscale& a) {
  return leading<T>(Bands::height(a) * a.W + 2 * W<T>);
}

template <class T>
static void take_weights(
    const Elements& from, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, int64_t row, T* to) {
  if (!from.data) return;
  const Elements first = from + row * row_stride;
  if (first.own<T>() && col_stride == 1 && row_stride == cols) {
    memcpy(to, first.data, rows * cols * sizeof(T));
    return;
  }
  with_type<T>(from.dtype, [&](auto type) {
    const auto* p = first.as<decltype(type)>();
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) *to++ = to_float(p[r * row_stride + c * col_stride]);
  });
}

// The weights of a head's three parts.
template <class T>
struct Weights {
  T *depthwise, *depthwise_bias, *pointwise, *pointwise_bias;  // [3 D][k k], [3 D], [3 D][D], [3 D]
  const Scale* loaded = nullptr;
  int64_t loaded_head = -1;
  static size_t bytes(const Multiscale& a) {
    int64_t k = 0;
    for (int64_t s = 0; s < a.S; ++s) k = a.scales[s].k > k ? a.scales[s].k : k;
    return Arena::bytes<T>(3 * a.D * k * k) + Arena::bytes<T>(3 * a.D * a.D) + 2 * Arena::bytes<T>(3 * a.D);
  }
  void take(const Multiscale& a) {
    int64_t k = 0;
    for (int64_t s = 0; s < a.S; ++s) k = a.scales[s].k > k ? a.scales[s].k : k;
    depthwise = arena.take<T>(3 * a.D * k * k), pointwise = arena.take<T>(3 * a.D * a.D);
    depthwise_bias = arena.take<T>(3 * a.D), pointwise_bias = arena.take<T>(3 * a.D);
  }
  void load_head(const Multiscale& a, const Scale& scale, int64_t h) {
    if (loaded == &scale && loaded_head == h) return;
    loaded = &scale, loaded_head = h;
    const int64_t rows = 3 * a.D, row = h * rows, k = scale.k;
    auto from = [&](const void* weights) { return Elements(weights, a.dtype); };
    if (scale.depthwise_y == k * scale.depthwise_x) {
      take_weights(from(scale.depthwise), rows, k * k, scale.depthwise_c, scale.depthwise_x, row, depthwise);
    } else {
      for (int64_t c = 0; c < rows; ++c)
        take_weights(
            from(scale.depthwise) + (row + c) * scale.depthwise_c, k, k, scale.depthwise_y, scale.depthwise_x, 0,
            depthwise + c * k * k);
    }
    take_weights(from(scale.pointwise), rows, a.D, scale.pointwise_o, scale.pointwise_c, row, pointwise);
    for (int64_t c = 0; c < rows; ++c) depthwise_bias[c] = 0;
    take_weights(from(scale.depthwise_bias), rows, 1, scale.depthwise_bias_c, 1, row, depthwise_bias);
    take_weights(from(scale.pointwise_bias), rows, 1, scale.pointwise_bias_o, 1, row, pointwise_bias);
  }
};

// What convolutions need in scratch.
template <class T>
struct Convolutions {
  Weights<T> weights;
  T *plane, *packed, *turned;
  int64_t* table;
  int64_t ld, packed_ld;
  const Multiscale& a;
  explicit Convolutions(const Multiscale& args) : a(args) {
    ld = band_ld<T>(a);
    packed_ld = a.qkv.x == 1 ? 0 : leading<T>((Bands::height(a) + widest() - 1) * a.W);
  }
  int64_t widest() const {
    int64_t k = 1;
    for (int64_t s = 0; s < a.S; ++s) k = a.scales[s].k > k ? a.scales[s].k : k;
    return k;
  }
  int64_t ldk() const { return round_up(a.D, W<T>); }
  int64_t plane_room() const { return (Bands::height(a) + widest()) * pitch_of(a.W, widest()) + 4 * W<T>; }
  size_t bytes() const {
    return Weights<T>::bytes(a) + Arena::bytes<T>(plane_room()) + Arena::bytes<T>(a.D * packed_ld) +
           Arena::bytes<T>(ldk() * ldk()) + Arena::bytes<int64_t>(packed_ld);
  }
  void take() {
    weights.take(a);
    plane = arena.take<T>(plane_room()), packed = arena.take<T>(a.D * packed_ld);
    turned = arena.take<T>(ldk() * ldk());
    table = arena.take<int64_t>(packed_ld);
  }
  // Part p (0: q, 1: k, 2: v) of a head, rows y0 .. y1, after the depthwise convolution.
  void depthwise(const Scale& scale, int64_t b, int64_t h, int64_t p, int64_t y0, int64_t y1, T* wide) {
    const int64_t D = a.D, k = scale.k, pad = k / 2, pitch = pitch_of(a.W, k);
    const int64_t low = y0 - pad > 0 ? y0 - pad : 0, high = y1 + pad < a.H ? y1 + pad : a.H;
    Head<T> in(a.dtype, a.qkv, b, 3 * h + p, D, a.H, a.W, table);
    fill(plane, (high - low) * pitch, T(0));  // the pads; what is between them changes with the channel
    auto channels = [&](const auto* from, int64_t step, int64_t row) __attribute__((always_inline)) {
      const int64_t width = a.W, first = p * D;
      T* const to = plane + pad;
      for (int64_t d = 0; d < D; ++d, from += step) {
        for (int64_t y = 0; y < high - low; ++y) put_row<T>(from + y * row, width, to + y * pitch);
        convolve<T>(
            k, plane, width, low, high, y0, y1, weights.depthwise + (first + d) * k * k,
            weights.depthwise_bias[first + d], wide + d * ld);
      }
    };
    if (packed_ld) {
      in.panel(false, low * a.W, (high - low) * a.W, packed, packed_ld);
      return channels(packed, packed_ld, a.W);
    }
    with_type<T>(a.dtype, [&](auto type) {
      channels((in.base + low * a.qkv.y).template as<decltype(type)>(), a.qkv.d, a.qkv.y);
    });
  }
  // After both convolutions, rectified or not: out[d * ld + n].
  void mix_rows(const Scale& scale, int64_t p, int64_t count, const T* wide, bool rectified, T* out) {
    const int64_t D = a.D;
    if (scale.pointwise_bias)
      for (int64_t o = 0; o < D; ++o) fill(out + o * ld, round_up(count, W<T>), weights.pointwise_bias[p * D + o]);
    const Start start = scale.pointwise_bias ? Start::from : Start::zero;
    product<T>(D, count, D, weights.pointwise + p * D * D, D, wide, ld, out, ld, {start, nullptr, rectified});
  }
  // After both and rectified: out[n * ldk + d].
  void mix_tokens(const Scale& scale, int64_t p, int64_t count, const T* wide, T* out) {
    const int64_t D = a.D;
    turn<T>(D, D, weights.pointwise + p * D * D, D, turned, ldk());
    if (scale.pointwise_bias) {
      const T* bias = weights.pointwise_bias + p * D;
      for (int64_t n = 0; n < count; ++n)
        for (int64_t d = 0; d < ldk(); ++d) out[n * ldk() + d] = d < D ? bias[d] : T(0);
    }
    const Start start = scale.pointwise_bias ? Start::from : Start::zero;
    product_columns<T>(count, D, D, wide, ld, turned, ldk(), out, ldk(), {start, nullptr, true});
  }
  void run(const Scale& scale, int64_t b, int64_t h, int64_t p, int64_t y0, int64_t y1, T* wide, T* out) {
    depthwise(scale, b, h, p, y0, y1, wide);
    mix_rows(scale, p, (y1 - y0) * a.W, wide, false, out);
  }
};

}  // namespace
}  // namespace MVK_ISA
}  // namespace mvk
