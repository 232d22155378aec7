// The 1x1 convolution, or linear layer, on CPUs, with a LayerNorm before and an activation and a residual after it.
//
// A unit is a block of pixels, rows of channels. They are normalised into scratch memory, if there is a norm, and multiplied by the
// weights, panel by panel: a panel stays in L1 while the rows pass. Input and output move once, weights once for each block.
#include "pointwise/pointwise.h"

#include "common/rows.h"

namespace mvk {
namespace MVK_ISA {
namespace {

static void pack(const PointwiseWeights& w) {
  const PointwiseSizes& s = w.sizes;
  pack_sizes(s, w.packed);
  float *weights = w.packed + s.weights(), *bias = w.packed + s.bias();
  pack_panels(w.weight, s.outputs, s.inputs, weights);
  pack_bias(w.bias, s.outputs, bias);
  // W (g x + b) + c = (W g) x + (W b + c)
  for (int64_t o = 0; s.normed && o < s.outputs; ++o) {
    double sum = 0;
    for (int64_t c = 0; c < s.inputs; ++c) {
      float& at = weights[(o / P * s.inputs + c) * P + o % P];
      if (w.norm_bias) sum += double(at) * double(w.norm_bias[c]);
      if (w.norm_weight) at *= w.norm_weight[c];
    }
    bias[o] = float(double(bias[o]) + sum);
  }
}

static void forward(const Pointwise& a, int64_t begin, int64_t end) {
  const PointwiseSizes& s = a.sizes;
  const int64_t ld = leading<float>(s.inputs);
  arena.reset(Arena::bytes<float>(s.normed ? a.block * ld : 0) + Arena::bytes<float>(kPart * P), a.poison);
  float* normed = arena.take<float>(s.normed ? a.block * ld : 0);
  float* panel = arena.take<float>(kPart * P);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t line = unit / a.blocks(), block = unit % a.blocks();
    // Nearly equal blocks.
    const int64_t first = a.length * block / a.blocks(), count = a.length * (block + 1) / a.blocks() - first;
    auto at = [&](const PixelMap& map) {
      return PixelRows{map.data ? map.data + line / a.H * map.b + line % a.H * map.y + first * map.x : nullptr, map.x};
    };
    PixelRows in = at(a.in);
    if (s.normed) {
      normalise_rows(in.data, in.step, count, s.inputs, float(a.eps), normed, ld);
      in = {normed, ld};
    }
    rows_product(
        count, s.inputs, s.outputs, in.data, in.step, a.packed + s.weights(), a.packed + s.bias(), a.activation,
        at(a.out), at(a.residual), panel);
  }
}

}  // namespace

extern const PointwiseKernels pointwise_kernels;
const PointwiseKernels pointwise_kernels = {P, pack, forward};

}  // namespace MVK_ISA
}  // namespace mvk
