// The 1x1 convolution, or linear layer, on CPUs, with a LayerNorm before and an activation and a residual after it.
//
// A unit is a block of pixels, rows of channels. They are normalised, or gated, into scratch memory and multiplied by the
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

// The rows times a gate; if `shifts`, less the centre before, plus the shift then. A factor and a shift alone would cancel on maps
// that are far from 0, after both were rounded.
template <bool shifts>
static void gate_rows(
    PixelRows from, int64_t count, int64_t channels, const float* gate, const float* centre, const float* shift,
    float* to, int64_t ld) {
  const int64_t whole = channels / W<float> * W<float>;
  const int left = int(channels - whole);
  for (int64_t n = 0; n < count; ++n, to += ld) {
    const float* row = from.from(n).data;
    for (int64_t c = 0; c < whole; c += W<float>) {
      vf y = load<float>(row + c);
      if constexpr (shifts) y -= load<float>(centre + c);
      y *= load<float>(gate + c);
      if constexpr (shifts) y += load<float>(shift + c);
      store<float>(to + c, y);
    }
    if (!left) continue;
    vf y = load_partial<float>(row + whole, left);
    if constexpr (shifts) y -= load_partial<float>(centre + whole, left);
    y *= load_partial<float>(gate + whole, left);
    if constexpr (shifts) y += load_partial<float>(shift + whole, left);
    store<float>(to + whole, y);
  }
}

static void forward(const Pointwise& a, int64_t begin, int64_t end) {
  const PointwiseSizes& s = a.sizes;
  const int64_t ld = leading<float>(s.inputs);
  const int64_t changed = s.normed || a.gate ? a.block * ld : 0;
  arena.reset(Arena::bytes<float>(changed) + Arena::bytes<float>(kPart * P), a.poison);
  float* rows = arena.take<float>(changed);
  float* panel = arena.take<float>(kPart * P);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t line = unit / a.blocks(), block = unit % a.blocks();
    // Nearly equal blocks.
    const int64_t first = a.length * block / a.blocks(), count = a.length * (block + 1) / a.blocks() - first;
    auto at = [&](const PixelMap& map) {
      return PixelRows{map.data ? map.data + line / a.H * map.b + line % a.H * map.y + first * map.x : nullptr, map.x};
    };
    PixelRows in = at(a.in);
    if (s.normed) normalise_rows(in.data, in.step, count, s.inputs, float(a.eps), rows, ld);
    const int64_t g = line / a.H * a.next_gate;
    if (a.shift)
      gate_rows<true>(in, count, s.inputs, a.gate + g, a.centre + g, a.shift + g, rows, ld);
    else if (a.gate)
      gate_rows<false>(in, count, s.inputs, a.gate + g, nullptr, nullptr, rows, ld);
    if (changed) in = {rows, ld};
    rows_product(
        count, s.inputs, s.outputs, in.data, in.step, a.packed + s.weights(), a.packed + s.bias(), a.activation,
        at(a.out), at(a.residual), panel, unit + 1 < end ? Stretch{} : a.following);
  }
}

}  // namespace

extern const PointwiseKernels pointwise_kernels;
const PointwiseKernels pointwise_kernels = {P, pack, forward};

}  // namespace MVK_ISA
}  // namespace mvk
