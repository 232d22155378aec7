// The inverted residual as boxed operators. Included by the files that register them alone.
#pragma once

#include "common/convolution_op.h"
#include "instruction_sets.h"
#include "inverted_residual/inverted_residual.h"

namespace mvk {
namespace {

constexpr const char* kInvertedResidual = "inverted_residual";

// The weights of a block as convolutions have them, and where to pack them still to be said. What is not given is null; `depthwise`
// is always given. The tensors become contiguous.
struct BlockTensors {
  Tensor expand, expand_bias, depthwise, depthwise_bias, project, project_bias;
};
InvertedResidualWeights block_weights(BlockTensors& t) {
  auto of_convolution = [](const Tensor& t) { return !t || t.dim() == 4; };
  require(
      of_convolution(t.depthwise) && of_convolution(t.project) && of_convolution(t.expand), kInvertedResidual,
      "weights of convolutions are wanted");
  const int64_t hidden = t.depthwise.sizes()[0], outputs = t.project ? t.project.sizes()[0] : 0;
  const int64_t side = t.depthwise.sizes()[2], inputs = t.expand ? t.expand.sizes()[1] : hidden;
  InvertedResidualWeights w{{current->inverted_residual->panel, inputs, hidden, outputs, side, bool(t.expand)}};
  w.expand = weight(kInvertedResidual, t.expand, hidden * inputs, true);
  w.expand_bias = weight(kInvertedResidual, t.expand_bias, hidden, true);
  w.depthwise = weight(kInvertedResidual, t.depthwise, hidden * side * side);
  w.depthwise_bias = weight(kInvertedResidual, t.depthwise_bias, hidden, true);
  w.project = weight(kInvertedResidual, t.project, outputs * hidden, true);
  w.project_bias = weight(kInvertedResidual, t.project_bias, outputs, true);
  return w;
}

// (Tensor? expand, Tensor? expand_bias, Tensor depthwise, Tensor? depthwise_bias, Tensor? project, Tensor? project_bias) -> Tensor
void inverted_residual_pack(Value* stack, uint64_t, uint64_t) {
  BlockTensors tensors{take_optional(stack[0]), take_optional(stack[1]), take(stack[2]),
                       take_optional(stack[3]), take_optional(stack[4]), take_optional(stack[5])};
  InvertedResidualWeights w = block_weights(tensors);
  Tensor packed = empty({packed_count(w.sizes)}, float32());
  w.packed = static_cast<float*>(packed.data());
  current->inverted_residual->pack(w);
  give(stack, packed);
}

// The elements of slopes (B, 2, hidden), which become contiguous; null if there are none.
const float* slopes_of(Tensor& slopes, int64_t batch, int64_t hidden) {
  require(
      !slopes || (slopes.dim() == 3 && slopes.sizes()[0] == batch && slopes.sizes()[1] == 2), kInvertedResidual,
      "slopes (B, 2, hidden) are wanted");
  return weight(kInvertedResidual, slopes, batch * 2 * hidden, true);
}

int64_t strided(int64_t size, int64_t stride) { return (size - 1) / stride + 1; }

// The block whose weights, stride, activations and residual are in `a` of a map (B, C, H, W), on all threads: a result, channels-last.
Tensor run_block(
    const InvertedResidualKernels& kernels, InvertedResidual a, const Tensor& x, Tensor& slopes_before,
    Tensor& slopes) {
  const InvertedResidualSizes& s = a.sizes;
  a.poison = poison;
  a.following = following.after(a.packed, first_panel(a.packed + s.expand(), kernels.panel, s.expands ? s.inputs : 9));
  const int64_t *n = x.sizes(), k = s.kernel;
  a.B = n[0], a.H = n[2], a.W = n[3];
  require(
      n[1] == s.inputs && (s.expands || n[1] == s.hidden) && (k == 3 || k == 5) && (a.stride == 1 || a.stride == 2) &&
          a.H > 0 && a.W > 0,
      kInvertedResidual, "map, weights and stride do not fit");
  require(!slopes_before || s.expands, kInvertedResidual, "there is no expansion for the first slopes");
  a.slopes_before = slopes_of(slopes_before, n[0], s.hidden), a.slopes = slopes_of(slopes, n[0], s.hidden);
  a.Ho = strided(a.H, a.stride), a.Wo = strided(a.W, a.stride);
  require(!a.residual || (a.stride == 1 && n[1] == s.outputs), kInvertedResidual, "no residual fits");
  const int64_t channels = s.outputs ? s.outputs : s.hidden;
  Tensor room,
      out = result({a.B, channels, a.Ho, a.Wo}, {a.Ho * a.Wo * channels, 1, a.Wo * channels, channels}, float32());
  a.in = pixel_rows(kInvertedResidual, x, room), a.out = pixel_map(kInvertedResidual, out);
  const double pixel = 2.0 * double(s.hidden) * double(s.outputs + k * k + a.stride * a.stride * n[1]);
  const double flops = pixel * double(a.Ho * a.Wo);
  a.chunks = chunks(a.B, flops, a.Ho / 2);
  if (a.B)
    parallel(a.B * a.chunks, grain(flops / double(a.chunks)), [&](int64_t i, int64_t j) { kernels.forward(a, i, j); });
  return out;
}

// (Tensor x, Tensor packed, int hidden, int outputs, int kernel, bool expands, int stride, int activation, bool residual,
// int before, Tensor? slopes_before, Tensor? slopes) -> Tensor, channels-last
void inverted_residual(Value* stack, uint64_t, uint64_t) {
  Tensor x = take(stack[0]), packed = take(stack[1]);
  require(x.dim() == 4 && x.dtype() == float32(), kInvertedResidual, "a float32 map of 4 axes is wanted");
  InvertedResidual a{};
  a.sizes = {
      current->inverted_residual->panel,
      x.sizes()[1],
      to<int64_t>(stack[2]),
      to<int64_t>(stack[3]),
      to<int64_t>(stack[4]),
      to<bool>(stack[5])};
  a.stride = to<int64_t>(stack[6]), a.activation = Activation(to<int64_t>(stack[7]));
  a.residual = to<bool>(stack[8]);
  const int64_t before = to<int64_t>(stack[9]);
  a.before = before < 0 ? a.activation : Activation(before);
  Tensor slopes_before = take_optional(stack[10]), slopes = take_optional(stack[11]);
  a.packed = packed_weights(kInvertedResidual, packed, a.sizes);
  Tensor out = run_block(*current->inverted_residual, a, x, slopes_before, slopes);
  give(stack, out);
}

}  // namespace
}  // namespace mvk
