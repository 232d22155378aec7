// The inverted residual as boxed torch operators. Included by register.cpp alone.
#pragma once

#include "common/tensor.h"
#include "instruction_sets.h"
#include "inverted_residual/inverted_residual.h"

namespace mvk {
namespace {

constexpr const char* kInvertedResidual = "inverted_residual";

// The elements of a float32 tensor of so many, which becomes contiguous; or null if it is not given.
const float* weight(Tensor& t, int64_t count, bool optional = false) {
  if (!t && optional) return nullptr;
  int64_t size = 1;
  for (int64_t i = t.dim(); i--;) size *= t.sizes()[i];
  require(
      size == count && t.dtype() == aoti_torch_dtype_float32(), kInvertedResidual,
      "a weight is not float32 of the size wanted");
  t = contiguous(std::move(t));
  return static_cast<const float*>(t.data());
}

// (Tensor? expand, Tensor? expand_bias, Tensor depthwise, Tensor? depthwise_bias, Tensor project, Tensor? project_bias) -> Tensor
void inverted_residual_pack(StableIValue* stack, uint64_t, uint64_t) {
  Tensor expand = take_optional(stack[0]), expand_bias = take_optional(stack[1]), depthwise = take(stack[2]);
  Tensor depthwise_bias = take_optional(stack[3]), project = take(stack[4]), project_bias = take_optional(stack[5]);
  const InvertedResidualKernels& kernels = *current->inverted_residual;
  require(depthwise.dim() == 4 && project.dim() == 4, kInvertedResidual, "weights of convolutions are wanted");
  require(!expand || expand.dim() == 4, kInvertedResidual, "weights of convolutions are wanted");
  const int64_t hidden = depthwise.sizes()[0], outputs = project.sizes()[0], side = depthwise.sizes()[2];
  const int64_t inputs = expand ? expand.sizes()[1] : hidden;
  InvertedResidualWeights w{{kernels.panel, inputs, hidden, outputs, side, bool(expand)}};
  w.expand = weight(expand, hidden * inputs, true), w.expand_bias = weight(expand_bias, hidden, true);
  w.depthwise = weight(depthwise, hidden * side * side), w.depthwise_bias = weight(depthwise_bias, hidden, true);
  w.project = weight(project, outputs * hidden), w.project_bias = weight(project_bias, outputs, true);
  Tensor packed = empty({w.sizes.count()}, aoti_torch_dtype_float32());
  w.packed = static_cast<float*>(packed.data());
  kernels.pack(w);
  give(stack, packed);
}

PixelMap pixel_map(const Tensor& x) {
  const int64_t* s = x.strides();
  return {static_cast<float*>(x.data()), s[0], s[2], s[3]};
}

// A new channels-last map.
Tensor empty_pixels(int64_t b, int64_t c, int64_t h, int64_t w) {
  return empty({b, c, h, w}, {h * w * c, 1, w * c, c}, aoti_torch_dtype_float32());
}

// (Tensor x, Tensor packed, int hidden, int outputs, int kernel, bool expands, int stride, int activation, bool residual) -> Tensor
void inverted_residual(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::to;
  Tensor x = take(stack[0]), packed = take(stack[1]);
  const InvertedResidualKernels& kernels = *current->inverted_residual;
  require(
      x.dim() == 4 && x.dtype() == aoti_torch_dtype_float32(), kInvertedResidual, "a float32 map of 4 axes is wanted");
  InvertedResidual a{};
  a.sizes = {kernels.panel,         x.sizes()[1],          to<int64_t>(stack[2]),
             to<int64_t>(stack[3]), to<int64_t>(stack[4]), to<bool>(stack[5])};
  a.stride = to<int64_t>(stack[6]), a.activation = Activation(to<int64_t>(stack[7]));
  a.residual = to<bool>(stack[8]), a.poison = poison;
  require(
      packed.dim() == 1 && packed.dtype() == aoti_torch_dtype_float32() && packed.sizes()[0] == a.sizes.count() &&
          packed.strides()[0] == 1,
      kInvertedResidual, "packed weights of these sizes are wanted");
  a.packed = static_cast<const float*>(packed.data());
  require(
      !std::memcmp(a.packed, &a.sizes, sizeof a.sizes), kInvertedResidual,
      "the weights were packed for other sizes, or for another instruction set");
  const int64_t *n = x.sizes(), k = a.sizes.kernel;
  a.B = n[0], a.H = n[2], a.W = n[3];
  require(
      (a.sizes.expands || n[1] == a.sizes.hidden) && (k == 3 || k == 5) && (a.stride == 1 || a.stride == 2) &&
          a.H > 0 && a.W > 0,
      kInvertedResidual, "map, weights and stride do not fit");
  a.Ho = (a.H - 1) / a.stride + 1, a.Wo = (a.W - 1) / a.stride + 1;
  require(!a.residual || (a.stride == 1 && n[1] == a.sizes.outputs), kInvertedResidual, "no residual fits");
  Tensor pixels, out = empty_pixels(a.B, a.sizes.outputs, a.Ho, a.Wo);
  const bool channels_last = x.strides()[1] == 1;
  if (!channels_last) copy(x, pixels = empty_pixels(a.B, n[1], a.H, a.W));
  a.in = pixel_map(channels_last ? x : pixels), a.out = pixel_map(out);
  const double pixel = 2.0 * double(a.sizes.hidden) * double(a.sizes.outputs + k * k + a.stride * a.stride * n[1]);
  const double flops = pixel * double(a.Ho * a.Wo);
  a.chunks = chunks(a.B, flops, a.Ho / 2);
  if (a.B)
    parallel(a.B * a.chunks, grain(flops / double(a.chunks)), [&](int64_t i, int64_t j) { kernels.forward(a, i, j); });
  if (!channels_last) {  // the result lies as the map does
    Tensor planes = empty({a.B, a.sizes.outputs, a.Ho, a.Wo}, aoti_torch_dtype_float32());
    copy(out, planes);
    out = std::move(planes);
  }
  give(stack, out);
}

}  // namespace
}  // namespace mvk
