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

template <class T, class S>
static void take_weights(
    const void* from, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, int64_t row, T* to) {
  if (!from) return;
  const S* p = static_cast<const S*>(from) + row * row_stride;
  if (std::is_same_v<T, S> && col_stride == 1 && row_stride == cols) {
    memcpy(to, p, rows * cols * sizeof(T));
    return;
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) *to++ = to_float(p[r * row_stride + c * col_stride]);
}

// The weights of a head's three parts.
template <class T>
struct Weights {
  T *depthwise, *depthwise_bias, *pointwise, *pointwise_bias;  // [3 D][k k], [3 D], [3 D][D], [3 D]
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
  template <class S>
  void load_head(const Multiscale& a, const Scale& scale, int64_t h) {
    const int64_t rows = 3 * a.D, row = h * rows, k = scale.k;
    if (scale.depthwise_y == k * scale.depthwise_x) {
      take_weights<T, S>(scale.depthwise, rows, k * k, scale.depthwise_c, scale.depthwise_x, row, depthwise);
    } else {
      for (int64_t c = 0; c < rows; ++c)
        take_weights<T, S>(
            static_cast<const S*>(scale.depthwise) + (row + c) * scale.depthwise_c, k, k, scale.depthwise_y,
            scale.depthwise_x, 0, depthwise + c * k * k);
    }
    take_weights<T, S>(scale.pointwise, rows, a.D, scale.pointwise_o, scale.pointwise_c, row, pointwise);
    for (int64_t c = 0; c < rows; ++c) depthwise_bias[c] = 0;
    take_weights<T, S>(scale.depthwise_bias, rows, 1, scale.depthwise_bias_c, 1, row, depthwise_bias);
    take_weights<T, S>(scale.pointwise_bias, rows, 1, scale.pointwise_bias_o, 1, row, pointwise_bias);
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
  template <class S>
  void depthwise(const Scale& scale, int64_t b, int64_t h, int64_t p, int64_t y0, int64_t y1, T* wide) {
    const int64_t D = a.D, k = scale.k, pad = k / 2, pitch = pitch_of(a.W, k);
    const int64_t low = y0 - pad > 0 ? y0 - pad : 0, high = y1 + pad < a.H ? y1 + pad : a.H;
    Head<T, const S> in(a.qkv, b, 3 * h + p, D, a.H, a.W, table);
    if (packed_ld) in.template panel<false>(low * a.W, (high - low) * a.W, packed, packed_ld);
    fill(plane, (high - low) * pitch, T(0));  // the pads; what is between them changes with the channel
    for (int64_t d = 0; d < D; ++d) {
      for (int64_t y = low; y < high; ++y) {
        T* to = plane + (y - low) * pitch + pad;
        if (packed_ld)
          put_row<T, T>(packed + d * packed_ld + (y - low) * a.W, a.W, to);
        else
          put_row<T, S>(in.base + d * a.qkv.d + y * a.qkv.y, a.W, to);
      }
      const int64_t c = p * D + d;
      convolve<T>(
          k, plane, a.W, low, high, y0, y1, weights.depthwise + c * k * k, weights.depthwise_bias[c], wide + d * ld);
    }
  }
  // After both convolutions: out[d * ld + n].
  template <bool Relu>
  void mix_rows(const Scale& scale, int64_t p, int64_t count, const T* wide, T* out) {
    const int64_t D = a.D;
    const T* mixing = weights.pointwise + p * D * D;
    if (scale.pointwise_bias) {
      for (int64_t o = 0; o < D; ++o) fill(out + o * ld, round_up(count, W<T>), weights.pointwise_bias[p * D + o]);
      product<T, Start::from>(D, count, D, mixing, D, wide, ld, out, ld);
      for (int64_t o = 0; Relu && o < D; ++o) rectify(out + o * ld, count);
    } else if (Relu) {
      ended_product<T, false>(D, count, D, mixing, D, 1, wide, ld, Rectified<T>{}, out, ld);
    } else {
      product<T, Start::zero>(D, count, D, mixing, D, wide, ld, out, ld);
    }
  }
  // After both and rectified: out[n * ldk + d].
  void mix_tokens(const Scale& scale, int64_t p, int64_t count, const T* wide, T* out) {
    const int64_t D = a.D;
    turn<T>(D, D, weights.pointwise + p * D * D, D, turned, ldk());
    if (scale.pointwise_bias) {
      const T* bias = weights.pointwise_bias + p * D;
      for (int64_t n = 0; n < count; ++n)
        for (int64_t d = 0; d < ldk(); ++d) out[n * ldk() + d] = d < D ? bias[d] : T(0);
      product_columns<T, Start::from>(count, D, D, wide, ld, turned, ldk(), out, ldk());
      rectify(out, count * ldk());
    } else {
      ended_product<T, true>(count, D, D, wide, 1, ld, turned, ldk(), Rectified<T>{}, out, ldk());
    }
  }
  static void rectify(T* to, int64_t count) {
    for (int64_t n = 0; n < count; n += W<T>) store<T>(to + n, relu<T>(load<T>(to + n)));
  }
  template <class S>
  void run(const Scale& scale, int64_t b, int64_t h, int64_t p, int64_t y0, int64_t y1, T* wide, T* out) {
    depthwise<S>(scale, b, h, p, y0, y1, wide);
    mix_rows<false>(scale, p, (y1 - y0) * a.W, wide, out);
  }
};

}  // namespace
}  // namespace MVK_ISA
}  // namespace mvk
