// What surrounds attention at inference, in one pass where PyTorch makes two or three: a batch norm at rest with its
// activation, y = f(scale_c x + shift_c), and the token mixer of EfficientFormer, y = mean of 3 x 3 neighbours - x.
//
// Work is split over planes of a channels-first map, over rows of the picture of a channels-last one. Each element is
// read and written once (three times read from L1 by the mean); nothing is kept between units.
#include "elementwise/elementwise.h"

#include "common/activate.h"

namespace mvk {
namespace MVK_ISA {
namespace {

// `count` elements in a row, all of one channel, or each of its own.
template <Activation f, bool one>
MVK_INLINE void row(const float* in, float* out, const float* scale, const float* shift, int64_t count) {
  constexpr int U = 4;
  const vf a = splat(*scale), b = splat(*shift);
  vf x[U];
  int64_t i = 0;
  for (; i + U * W<float> <= count; i += U * W<float>) {
    MVK_EACH {
      const int64_t at = i + u * W<float>;
      x[u] = load<float>(in + at) * (one ? a : load<float>(scale + at)) + (one ? b : load<float>(shift + at));
    }
    activate<f, U>(x);
    MVK_EACH store<float>(out + i + u * W<float>, x[u]);
  }
  for (; i < count; i += W<float>) {
    const int n = int(count - i < W<float> ? count - i : W<float>);
    x[0] = load_partial<float>(in + i, n < W<float> ? n : 0);
    if (n == W<float>) x[0] = load<float>(in + i);
    vf m = a, s = b;
    if constexpr (!one) {
      m = n < W<float> ? load_partial<float>(scale + i, n) : load<float>(scale + i);
      s = n < W<float> ? load_partial<float>(shift + i, n) : load<float>(shift + i);
    }
    x[0] = x[0] * m + s;
    activate<f, 1>(x);
    if (n == W<float>) {
      store<float>(out + i, x[0]);
    } else {
      store_partial<float>(out + i, x[0], n);
    }
  }
}

template <Activation f>
static void norm_activation_of(const NormActivation& a, int64_t begin, int64_t end) {
  const Maps& m = a.maps;
  for (int64_t unit = begin; unit < end; ++unit) {
    const float* in = m.in + unit * m.unit_size();
    float* out = m.out + unit * m.unit_size();
    if (m.channels_last) {
      for (int64_t x = 0; x < m.W; ++x) row<f, false>(in + x * m.C, out + x * m.C, a.scale, a.shift, m.C);
    } else {
      const int64_t c = unit % m.C;
      row<f, true>(in, out, a.scale + c, a.shift + c, m.unit_size());
    }
  }
}

static void norm_activation(const NormActivation& a, int64_t begin, int64_t end) {
  with_activation(a.activation, [&](auto known) { norm_activation_of<known()>(a, begin, end); });
}

// Elements [begin, end) of a row of the picture, all with the same neighbours: those of `lines` rows, itself among them,
// from `before` to `after` the element, `step` apart.
template <int lines>
MVK_INLINE void difference(
    const float* const* from, const float* in, float* out, int64_t begin, int64_t end, int64_t before, int64_t after,
    int64_t step) {
  const vf share = splat(1.0f / float(lines * int(1 + (before > 0) + (after > 0))));
  for (int64_t i = begin; i < end; i += W<float>) {
    const int n = int(end - i < W<float> ? end - i : W<float>);
    auto at = [&](const float* p) { return n == W<float> ? load<float>(p) : load_partial<float>(p, n); };
    vf sum = {};
    for (int line = 0; line < lines; ++line)
      for (int64_t j = i - before; j <= i + after; j += step) sum += at(from[line] + j);
    const vf y = sum * share - at(in + i);
    if (n == W<float>) {
      store<float>(out + i, y);
    } else {
      store_partial<float>(out + i, y, n);
    }
  }
}

template <int lines>
static void difference_row(
    const float* const* from, const float* in, float* out, int64_t count, int64_t width, int64_t step) {
  if (width == 1) return difference<lines>(from, in, out, 0, count, 0, 0, step);
  difference<lines>(from, in, out, 0, step, 0, step, step);
  difference<lines>(from, in, out, step, count - step, step, step, step);
  difference<lines>(from, in, out, count - step, count, step, 0, step);
}

static void pooled_difference(const Maps& m, int64_t begin, int64_t end) {
  const int64_t step = m.channels_last ? m.C : 1, count = m.W * step;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = m.channels_last ? unit % m.H : 0, rows = m.channels_last ? 1 : m.H;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t y = first + i, at = unit * m.unit_size() + i * count;
      const float* from[3];
      int lines = 0;
      for (int64_t dy = -1; dy <= 1; ++dy)
        if (y + dy >= 0 && y + dy < m.H) from[lines++] = m.in + at + dy * count;
      const auto go = lines == 3 ? difference_row<3> : lines == 2 ? difference_row<2> : difference_row<1>;
      go(from, m.in + at, m.out + at, count, m.W, step);
    }
  }
}

}  // namespace

extern const ElementwiseKernels elementwise_kernels;
const ElementwiseKernels elementwise_kernels = {norm_activation, pooled_difference};

}  // namespace MVK_ISA
}  // namespace mvk
