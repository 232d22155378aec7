// The inverted residual as boxed operators. Included by the files that register them alone.
#pragma once

#include "common/convolution_op.h"
#include "instruction_sets.h"
#include "inverted_residual/inverted_residual.h"

namespace mvk {
namespace {

constexpr const char* kInvertedResidual = "inverted_residual";

// (Tensor? expand, Tensor? expand_bias, Tensor depthwise, Tensor? depthwise_bias, Tensor? project, Tensor? project_bias) -> Tensor
void inverted_residual_pack(Value* stack, uint64_t, uint64_t) {
  Tensor expand = take_optional(stack[0]), expand_bias = take_optional(stack[1]), depthwise = take(stack[2]);
  Tensor depthwise_bias = take_optional(stack[3]), project = take_optional(stack[4]),
         project_bias = take_optional(stack[5]);
  const InvertedResidualKernels& kernels = *current->inverted_residual;
  auto of_convolution = [](const Tensor& t) { return !t || t.dim() == 4; };
  require(
      of_convolution(depthwise) && of_convolution(project) && of_convolution(expand), kInvertedResidual,
      "weights of convolutions are wanted");
  const int64_t hidden = depthwise.sizes()[0], outputs = project ? project.sizes()[0] : 0, side = depthwise.sizes()[2];
  const int64_t inputs = expand ? expand.sizes()[1] : hidden;
  InvertedResidualWeights w{{kernels.panel, inputs, hidden, outputs, side, bool(expand)}};
  w.expand = weight(kInvertedResidual, expand, hidden * inputs, true),
  w.expand_bias = weight(kInvertedResidual, expand_bias, hidden, true);
  w.depthwise = weight(kInvertedResidual, depthwise, hidden * side * side),
  w.depthwise_bias = weight(kInvertedResidual, depthwise_bias, hidden, true);
  w.project = weight(kInvertedResidual, project, outputs * hidden, true),
  w.project_bias = weight(kInvertedResidual, project_bias, outputs, true);
  Tensor packed = empty({packed_count(w.sizes)}, float32());
  w.packed = static_cast<float*>(packed.data());
  kernels.pack(w);
  give(stack, packed);
}

// The elements of slopes (B, 2, hidden), which become contiguous; null if there are none.
const float* slopes_of(Tensor& slopes, int64_t batch, int64_t hidden) {
  require(
      !slopes || (slopes.dim() == 3 && slopes.sizes()[0] == batch && slopes.sizes()[1] == 2), kInvertedResidual,
      "slopes (B, 2, hidden) are wanted");
  return weight(kInvertedResidual, slopes, batch * 2 * hidden, true);
}

// (Tensor x, Tensor packed, int hidden, int outputs, int kernel, bool expands, int stride, int activation, bool residual,
// int before, Tensor? slopes_before, Tensor? slopes) -> Tensor, channels-last
void inverted_residual(Value* stack, uint64_t, uint64_t) {
  Tensor x = take(stack[0]), packed = take(stack[1]);
  const InvertedResidualKernels& kernels = *current->inverted_residual;
  require(x.dim() == 4 && x.dtype() == float32(), kInvertedResidual, "a float32 map of 4 axes is wanted");
  InvertedResidual a{};
  a.sizes = {kernels.panel,         x.sizes()[1],          to<int64_t>(stack[2]),
             to<int64_t>(stack[3]), to<int64_t>(stack[4]), to<bool>(stack[5])};
  a.stride = to<int64_t>(stack[6]), a.activation = Activation(to<int64_t>(stack[7]));
  a.residual = to<bool>(stack[8]), a.poison = poison;
  const int64_t before = to<int64_t>(stack[9]);
  a.before = before < 0 ? a.activation : Activation(before);
  Tensor slopes_before = take_optional(stack[10]), slopes = take_optional(stack[11]);
  a.packed = packed_weights(kInvertedResidual, packed, a.sizes);
  a.following = following.after(
      a.packed, first_panel(a.packed + a.sizes.expand(), kernels.panel, a.sizes.expands ? x.sizes()[1] : 9));
  const int64_t *n = x.sizes(), k = a.sizes.kernel;
  a.B = n[0], a.H = n[2], a.W = n[3];
  require(
      (a.sizes.expands || n[1] == a.sizes.hidden) && (k == 3 || k == 5) && (a.stride == 1 || a.stride == 2) &&
          a.H > 0 && a.W > 0,
      kInvertedResidual, "map, weights and stride do not fit");
  require(!slopes_before || a.sizes.expands, kInvertedResidual, "there is no expansion for the first slopes");
  a.slopes_before = slopes_of(slopes_before, n[0], a.sizes.hidden), a.slopes = slopes_of(slopes, n[0], a.sizes.hidden);
  a.Ho = (a.H - 1) / a.stride + 1, a.Wo = (a.W - 1) / a.stride + 1;
  require(!a.residual || (a.stride == 1 && n[1] == a.sizes.outputs), kInvertedResidual, "no residual fits");
  Tensor room, out = empty_pixels(a.B, a.sizes.outputs ? a.sizes.outputs : a.sizes.hidden, a.Ho, a.Wo);
  a.in = pixel_rows(kInvertedResidual, x, room), a.out = pixel_map(kInvertedResidual, out);
  const double pixel = 2.0 * double(a.sizes.hidden) * double(a.sizes.outputs + k * k + a.stride * a.stride * n[1]);
  const double flops = pixel * double(a.Ho * a.Wo);
  a.chunks = chunks(a.B, flops, a.Ho / 2);
  if (a.B)
    parallel(a.B * a.chunks, grain(flops / double(a.chunks)), [&](int64_t i, int64_t j) { kernels.forward(a, i, j); });
  give(stack, out);
}

}  // namespace
}  // namespace mvk
