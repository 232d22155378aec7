// Maps and weights of convolutions, for the registration. Included by the files that register ops alone.
#pragma once

#include "common/following_op.h"
#include "common/tensor.h"
#include "instruction_sets.h"

namespace mvk {
namespace {

// The elements of a float32 tensor of so many, which becomes contiguous; or null if it is not given.
const float* weight(const char* op, Tensor& t, int64_t count, bool optional = false) {
  if (!t && optional) return nullptr;
  int64_t size = 1;
  for (int64_t i = t.dim(); i--;) size *= t.sizes()[i];
  require(size == count && t.dtype() == float32(), op, "a weight is not float32 of the size wanted");
  t = contiguous(std::move(t));
  return static_cast<const float*>(t.data());
}

PixelMap pixel_map(const char* op, const Tensor& x) {
  require(x.dim() == 4 && x.dtype() == float32(), op, "a float32 map of 4 axes is wanted");
  const int64_t* s = x.strides();
  return {static_cast<float*>(x.data()), s[0], s[1], s[2], s[3]};
}

// A new channels-last map.
Tensor empty_pixels(int64_t b, int64_t c, int64_t h, int64_t w) {
  return empty({b, c, h, w}, {h * w * c, 1, w * c, c}, float32());
}

// A map whose channels are side by side: this one, or a copy, which `room` then owns.
PixelMap pixel_rows(const char* op, const Tensor& x, Tensor& room) {
  const PixelMap map = pixel_map(op, x);
  if (map.c == 1) return map;
  const int64_t* n = x.sizes();
  copy(x, room = empty_pixels(n[0], n[1], n[2], n[3]));
  return pixel_map(op, room);
}

// The map that is added to a result, if there is one.
PixelMap residual_rows(const char* op, const Tensor& residual, const Tensor& out, Tensor& room) {
  if (!residual) return {};
  require(residual.dim() == 4 && same_sizes(residual, out, {0, 1, 2, 3}), op, "the residual does not fit");
  return pixel_rows(op, residual, room);
}

// What is read first of weights in panels of K rows; of a long panel, as much as may stay in L2 beside what is there.
Stretch first_panel(const float* weights, int64_t panel, int64_t K) {
  return {weights, std::min(K * panel * int64_t(sizeof(float)), int64_t(128) << 10)};
}

// Packed weights for these sizes, with which they begin.
template <class Sizes>
const float* packed_weights(const char* op, const Tensor& packed, const Sizes& sizes) {
  require(
      packed.dim() == 1 && packed.dtype() == float32() && packed.sizes()[0] == packed_count(sizes) &&
          packed.strides()[0] == 1,
      op, "packed is not what its function makes of weights of these sizes");
  const auto* data = static_cast<const float*>(packed.data());
  require(
      !std::memcmp(data, &sizes, sizeof sizes), op,
      "packed is of other sizes, or was packed under another instruction set");
  return data;
}

}  // namespace
}  // namespace mvk
