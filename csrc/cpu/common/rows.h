// Products of pixels, as rows of channels, with packed weights: what 1x1 convolutions and linear layers are made of.
#pragma once

#include <cmath>

#include "common/packed.h"

namespace mvk {
namespace MVK_ISA {
namespace {

// (x - mean) / sqrt(variance + eps) of each of `count` rows: what a LayerNorm does but for its weight and bias, which are folded
// into the product behind it.
static void normalise_rows(
    const float* from, int64_t step, int64_t count, int64_t channels, float eps, float* to, int64_t ld) {
  const int64_t whole = channels / W<float> * W<float>;
  const int left = int(channels - whole);
  for (int64_t n = 0; n < count; ++n, from += step, to += ld) {
    vf sum[2] = {};
    int64_t c = 0;
    for (; c + 2 * W<float> <= whole; c += 2 * W<float>)
      sum[0] += load<float>(from + c), sum[1] += load<float>(from + c + W<float>);
    for (; c < whole; c += W<float>) sum[0] += load<float>(from + c);
    if (left) sum[1] += load_partial<float>(from + whole, left);
    const vf mean = splat(lane_sum<float>(sum[0] + sum[1]) / float(channels));
    vf rests = {}, squares = {};
    for (c = 0; c < whole; c += W<float>) {
      const vf d = load<float>(from + c) - mean;
      store<float>(to + c, d);
      rests += d, squares += d * d;
    }
    if (left) {
      store<float>(to + whole, load_partial<float>(from + whole, left) - mean);
      const vf d = load_partial<float>(to + whole, left);  // lanes past the last channel would count as -mean
      rests += d, squares += d * d;
    }
    // The mean was rounded, by more than the channels differ where they are nearly equal.
    const float rest = lane_sum<float>(rests) / float(channels);
    const float variance = lane_sum<float>(squares) / float(channels) - rest * rest;
    const vf scale = splat(1 / std::sqrt((variance < 0 ? 0 : variance) + eps)), correction = splat(rest);
    for (c = 0; c < channels; c += W<float>) store<float>(to + c, (load<float>(to + c) - correction) * scale);
  }
}

// Rows of a product at a time: what is yet to be activated stays in L1, beside a panel of the weights.
constexpr int64_t kPart = 48;

// out = f(a B + bias) + residual for `count` rows of a, `lda` apart, and `outputs` columns of B, packed in panels of K rows. Whole
// vectors go straight to the map where nothing but the residual is to be added; else by the way of `panel`, [kPart][P]. `following` is
// prefetched at the end.
static void rows_product(
    int64_t count, int64_t K, int64_t outputs, const float* a, int64_t lda, const float* weights, const float* bias,
    Activation activation, PixelRows out, PixelRows residual, float* panel, Stretch following) {
  for (int64_t first = 0; first < outputs; first += P, weights += K * P) {
    const int64_t columns = outputs - first < P ? outputs - first : P;
    const int vectors = columns > W<float> ? 2 : 1;
    const PixelRows to = out.at(first), plus = residual.at(first);
    End<float> end;
    end.bias = bias + first;
    // One row reads its weights as one stream, which the processor foresees.
    const Stretch ahead = first + P < outputs ? panel_at(weights + K * P, count > 1 ? K : 0) : following;
    NextWeights next(tiles_of(vectors, count, K), ahead);
    if (activation == Activation::identity && columns == vectors * W<float>) {
      end.plus = plus.data, end.ldp = plus.step;
      product_in_parts<float>(vectors, count, K, a, lda, weights, P, to.data, to.step, end, next);
      continue;
    }
    for (int64_t n = 0; n < count; n += kPart) {
      const int64_t some = count - n < kPart ? count - n : kPart;
      product_in_parts<float>(vectors, some, K, a + n * lda, lda, weights, P, panel, P, end, next);
      put_panel(activation, panel, some, columns, plus.from(n), to.from(n));
    }
  }
}

}  // namespace
}  // namespace MVK_ISA
}  // namespace mvk
