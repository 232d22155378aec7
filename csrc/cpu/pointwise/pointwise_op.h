// The 1x1 convolution as boxed operators. Included by the files that register them alone.
#pragma once

#include "common/convolution_op.h"
#include "pointwise/pointwise.h"

namespace mvk {
namespace {

constexpr const char* kPointwise = "pointwise";

// (Tensor weight, Tensor? bias, bool normed, Tensor? norm_weight, Tensor? norm_bias) -> Tensor
void pointwise_pack(Value* stack, uint64_t, uint64_t) {
  Tensor weights = take(stack[0]), bias = take_optional(stack[1]);
  const bool normed = to<bool>(stack[2]);
  Tensor norm_weight = take_optional(stack[3]), norm_bias = take_optional(stack[4]);
  require(weights.dim() >= 2, kPointwise, "a weight (C_out, C) is wanted");
  const int64_t outputs = weights.sizes()[0], inputs = weights.sizes()[1];
  PointwiseWeights w{{current->pointwise->panel, inputs, outputs, normed}};
  w.weight = weight(kPointwise, weights, outputs * inputs), w.bias = weight(kPointwise, bias, outputs, true);
  w.norm_weight = weight(kPointwise, norm_weight, inputs, true);
  w.norm_bias = weight(kPointwise, norm_bias, inputs, true);
  Tensor packed = empty({packed_count(w.sizes)}, float32());
  w.packed = static_cast<float*>(packed.data());
  current->pointwise->pack(w);
  give(stack, packed);
}

// Whether all maps' pixels are equally far apart in a picture, and in the whole batch.
bool joined(const PixelMap& map, int64_t height, int64_t width) {
  return !map.data || map.y == width * map.x || height == 1;
}
bool joined(const PixelMap& map, int64_t batch, int64_t height, int64_t width) {
  return joined(map, height, width) && (!map.data || batch == 1 || map.b == height * width * map.x);
}

// (Tensor x, Tensor packed, int outputs, bool normed, float eps, int activation, Tensor? residual, Tensor? gate) -> Tensor,
// channels-last
void pointwise(Value* stack, uint64_t, uint64_t) {
  Tensor x = take(stack[0]), packed = take(stack[1]), plus = take_optional(stack[6]);
  Tensor gate = take_optional(stack[7]);
  const PointwiseKernels& kernels = *current->pointwise;
  Pointwise a{};
  Tensor room, room_plus;
  a.in = pixel_rows(kPointwise, x, room);
  const int64_t* n = x.sizes();
  a.H = n[2], a.W = n[3];
  a.sizes = {kernels.panel, n[1], to<int64_t>(stack[2]), to<bool>(stack[3])};
  a.eps = to<double>(stack[4]), a.activation = Activation(to<int64_t>(stack[5])), a.poison = poison;
  a.packed = packed_weights(kPointwise, packed, a.sizes);
  a.following = following.after(a.packed, first_panel(a.packed + a.sizes.weights(), a.sizes.panel, a.sizes.inputs));
  require(a.H > 0 && a.W > 0 && n[1] > 0, kPointwise, "an axis is empty");
  require(!gate || !a.sizes.normed, kPointwise, "a gate stands in the place of a norm");
  if (gate) {
    const int64_t parts = gate.dim() == 3 ? gate.sizes()[1] : 1;
    require(parts == 1 || parts == 3, kPointwise, "a gate (B, C) or (B, 3, C) is wanted");
    a.gate = weight(kPointwise, gate, n[0] * parts * n[1]), a.next_gate = parts * n[1];
    if (parts == 3) a.centre = a.gate + n[1], a.shift = a.centre + n[1];
  }
  Tensor out = empty_pixels(n[0], a.sizes.outputs, a.H, a.W);
  a.out = pixel_map(kPointwise, out);
  a.residual = residual_rows(kPointwise, plus, out, room_plus);
  if (n[0]) {
    const bool picture = joined(a.in, a.H, a.W) && joined(a.residual, a.H, a.W);
    // A gate is a picture's.
    const bool all = (!a.gate || n[0] == 1) && joined(a.in, n[0], a.H, a.W) && joined(a.residual, n[0], a.H, a.W);
    // Rows of pictures that are lines of their own have a height; otherwise one line is as high as a picture.
    a.lines = all ? 1 : picture ? n[0] : n[0] * a.H;
    a.length = n[0] * a.H * a.W / a.lines;
    if (picture || all) a.H = 1;
    constexpr int64_t kMost = 192, kLeast = 48;  // pixels
    const int64_t share = (n[0] * n[2] * n[3] + threads() - 1) / threads();
    // As many blocks as threads, or a multiple of it: a thread less for the last block would be waited for.
    const int64_t parts = (share + kMost - 1) / kMost;
    a.block = std::min(std::max((share + parts - 1) / parts, kLeast), a.length);
    const double flops = 2.0 * double(a.block) * double(n[1]) * double(a.sizes.outputs);
    parallel(a.lines * a.blocks(), grain(flops), [&](int64_t i, int64_t j) { kernels.forward(a, i, j); });
  }
  give(stack, out);
}

}  // namespace
}  // namespace mvk
