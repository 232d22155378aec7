// The dense 3x3 convolution as boxed operators. Included by the files that register them alone.
#pragma once

#include "common/convolution_op.h"
#include "conv3x3/conv3x3.h"

namespace mvk {
namespace {

constexpr const char* kConv3x3 = "conv3x3";

// (Tensor weight, Tensor? bias, int tile) -> Tensor
void conv3x3_pack(Value* stack, uint64_t, uint64_t) {
  Tensor weights = take(stack[0]), bias = take_optional(stack[1]);
  const int64_t tile = to<int64_t>(stack[2]);
  require(weights.dim() == 4 && (tile == 0 || tile == 2 || tile == 4), kConv3x3, "there is no such algorithm");
  const int64_t* n = weights.sizes();
  const Conv3x3Sizes sizes = {current->conv3x3->panel, n[1], n[0], tile};
  const float* w = weight(kConv3x3, weights, n[0] * n[1] * 9);
  const float* b = weight(kConv3x3, bias, n[0], true);
  Tensor packed = empty({packed_count(sizes)}, float32());
  current->conv3x3->pack(sizes, w, b, static_cast<float*>(packed.data()));
  give(stack, packed);
}

// (Tensor x, Tensor? beside, Tensor packed, int outputs, int tile, int stride, int activation, Tensor? residual) -> Tensor,
// channels-last
void conv3x3(Value* stack, uint64_t, uint64_t) {
  Tensor x = take(stack[0]), beside = take_optional(stack[1]), packed = take(stack[2]), plus = take_optional(stack[7]);
  const Conv3x3Kernels& kernels = *current->conv3x3;
  Conv3x3 a{};
  a.in = pixel_map(kConv3x3, x);
  const int64_t* n = x.sizes();
  a.B = n[0], a.first = n[1], a.H = n[2], a.W = n[3];
  if (beside) {
    a.beside = pixel_map(kConv3x3, beside);
    require(same_sizes(x, beside, {0, 2, 3}), kConv3x3, "the two maps do not fit");
  }
  a.sizes = {kernels.panel, a.first + (beside ? beside.sizes()[1] : 0), to<int64_t>(stack[3]), to<int64_t>(stack[4])};
  a.stride = to<int64_t>(stack[5]), a.activation = Activation(to<int64_t>(stack[6])), a.poison = poison;
  a.packed = packed_weights(kConv3x3, packed, a.sizes);
  const int64_t rows = a.sizes.inputs * (a.sizes.tile ? 1 : 9);
  a.following = following.after(a.packed, first_panel(a.packed + a.sizes.weights(), kernels.panel, rows));
  require(
      a.H > 0 && a.W > 0 && (a.stride == 1 || (a.stride == 2 && !a.sizes.tile)), kConv3x3,
      "map, weights and stride do not fit");
  // The direct algorithm reads maps as they are.
  Tensor room, room_beside, room_plus;
  if (a.sizes.tile) a.in = pixel_rows(kConv3x3, x, room);
  if (a.sizes.tile && beside) a.beside = pixel_rows(kConv3x3, beside, room_beside);
  a.Ho = (a.H - 1) / a.stride + 1, a.Wo = (a.W - 1) / a.stride + 1;
  Tensor out = empty_pixels(a.B, a.sizes.outputs, a.Ho, a.Wo);
  a.residual = residual_rows(kConv3x3, plus, out, room_plus);
  a.out = pixel_map(kConv3x3, out);
  const int64_t tile = std::max<int64_t>(a.sizes.tile, 1), side = tile + (a.sizes.tile ? 2 : 0);
  const double products = a.sizes.tile ? double(side * side) / double(tile * tile) : 9.0;
  const double flops = 2.0 * products * double(a.Ho * a.Wo) * double(a.sizes.inputs * a.sizes.outputs);
  a.chunks = chunks(a.B, flops, a.sizes.tile ? (a.H + tile - 1) / tile : a.Ho / 2);
  if (a.B)
    parallel(a.B * a.chunks, grain(flops / double(a.chunks)), [&](int64_t i, int64_t j) { kernels.forward(a, i, j); });
  give(stack, out);
}

}  // namespace
}  // namespace mvk
