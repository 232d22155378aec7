// What surrounds attention at inference, in one pass where PyTorch makes two or three: a batch norm at rest with its
// activation, y = f(scale_c x + shift_c), and the token mixer of EfficientFormer and PoolFormer, y = mean of 3 x 3 neighbours - x,
// or x + factor_c y with the sum behind it.
//
// Work is split over planes of a channels-first map, over rows of the picture of a channels-last one. Each element is
// read and written once (three times read from L1 by the mean); nothing is kept between units.
#include "elementwise/elementwise.h"

#include "common/activate.h"
#include "common/arena.h"

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

// The vector at `p` of a row that has `left` more elements.
MVK_INLINE vf take(const float* p, int64_t left) {
  return left >= W<float> ? load<float>(p) : load_partial<float>(p, int(left));
}
MVK_INLINE void put(float* p, vf x, int64_t left) {
  if (left >= W<float>) return store<float>(p, x);
  store_partial<float>(p, x, int(left));
}

// The sums of up to 3 rows less `centre`, element by element; past the last element some more are written.
template <int lines>
static void add_rows(const float* const* from, float centre, int64_t count, float* to) {
  const vf m = splat(centre);
  for (int64_t i = 0; i < count; i += W<float>) {
    vf sum = take(from[0] + i, count - i) - m;
    for (int line = 1; line < lines; ++line) sum += take(from[line] + i, count - i) - m;
    store<float>(to + i, sum);
  }
}

// Elements [begin, end) of a row of the picture, all with the same neighbours: `sums` of rows from `before` to `after` the element,
// `step` apart, each with a share.
template <bool adds, int neighbours>
MVK_INLINE void difference(
    const float* sums, float share, const float* in, const float* factor, float centre, float* out, int64_t begin,
    int64_t end, int64_t before, int64_t step) {
  for (int64_t i = begin; i < end; i += W<float>) {
    const float* first = sums + i - before;
    vf sum = load<float>(first);
    if constexpr (neighbours > 1) sum += load<float>(first + step);
    if constexpr (neighbours > 2) sum += load<float>(first + 2 * step);
    const vf x = take(in + i, end - i);
    vf y = sum * splat(share / float(neighbours)) - (x - splat(centre));
    if constexpr (adds) y = x + take(factor + i, end - i) * y;
    put(out + i, y, end - i);
  }
}

template <bool adds>
static void difference_row(
    const float* sums, int lines, const float* in, const float* factor, float centre, float* out, int64_t count,
    int64_t width, int64_t step) {
  const float share = 1.0f / float(lines);
  if (width == 1) return difference<adds, 1>(sums, share, in, factor, centre, out, 0, count, 0, step);
  difference<adds, 2>(sums, share, in, factor, centre, out, 0, step, 0, step);
  difference<adds, 3>(sums, share, in, factor, centre, out, step, count - step, step, step);
  difference<adds, 2>(sums, share, in, factor, centre, out, count - step, count, step, step);
}

// The factors of all elements of a row: of a channels-last map those of the channels again and again, of a plane one.
static void fill_factors(const Pooled& a, int64_t unit, float* to) {
  const Maps& m = a.maps;
  const float* from = a.factor + unit / (m.channels_last ? m.H : m.C) * a.next;
  for (int64_t x = 0; x < m.W; ++x) {
    if (m.channels_last)
      memcpy(to + x * m.C, from, m.C * sizeof(float));
    else
      to[x] = from[unit % m.C];
  }
}

template <bool adds>
static void pooled(const Pooled& a, int64_t begin, int64_t end) {
  const Maps& m = a.maps;
  const int64_t step = m.channels_last ? m.C : 1, count = m.W * step, room = count + 2 * W<float>;
  arena.reset(Arena::bytes<float>(room) + Arena::bytes<float>(adds ? count : 0), a.poison);
  float* sums = arena.take<float>(room);
  float* factor = arena.take<float>(adds ? count : 0);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = m.channels_last ? unit % m.H : 0, rows = m.channels_last ? 1 : m.H;
    if (adds && (unit == begin || first == 0)) fill_factors(a, unit, factor);
    const float centre = a.centre ? a.centre[unit / (m.channels_last ? m.H : m.C) * a.next] : 0;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t y = first + i, at = unit * m.unit_size() + i * count;
      const float* from[3];
      int lines = 0;
      for (int64_t dy = -1; dy <= 1; ++dy)
        if (y + dy >= 0 && y + dy < m.H) from[lines++] = m.in + at + dy * count;
      (lines == 3 ? add_rows<3> : lines == 2 ? add_rows<2> : add_rows<1>)(from, centre, count, sums);
      difference_row<adds>(sums, lines, m.in + at, factor, centre, m.out + at, count, m.W, step);
    }
  }
}

static void pooled_difference(const Pooled& a, int64_t begin, int64_t end) {
  (a.factor ? pooled<true> : pooled<false>)(a, begin, end);
}

// The sums of x - centre and of its squares over all elements, in parts of so few that floats are exact enough.
template <bool squares>
static void add_up(const float* x, int64_t count, float centre, double* sum, double* of_squares) {
  constexpr int U = 4;
  constexpr int64_t kPart = 16 * U * W<float>;
  const vf m = splat(centre);
  for (int64_t first = 0; first < count; first += kPart) {
    const int64_t end = count - first < kPart ? count : first + kPart;
    vf s[U] = {}, q[U] = {};
    int64_t i = first;
    for (; i + U * W<float> <= end; i += U * W<float>) {
      MVK_EACH {
        const vf d = load<float>(x + i + u * W<float>) - m;
        s[u] += d;
        if constexpr (squares) q[u] += d * d;
      }
    }
    for (; i + W<float> <= end; i += W<float>) {
      const vf d = load<float>(x + i) - m;
      s[0] += d;
      if constexpr (squares) q[0] += d * d;
    }
    *sum += double(lane_sum<float>((s[0] + s[1]) + (s[2] + s[3])));
    if constexpr (squares) *of_squares += double(lane_sum<float>((q[0] + q[1]) + (q[2] + q[3])));
    for (; i < end; ++i) {
      const float d = x[i] - centre;
      *sum += double(d);
      if constexpr (squares) *of_squares += double(d) * double(d);
    }
  }
}

// The mean of what is far from 0 loses to rounding what matters after its subtraction. So the second pass takes the mean
// of deviations from it, which the mean and the variance are corrected by.
static void moments(const float* x, int64_t count, double* mean, double* variance) {
  double sum = 0, rest = 0, squares = 0;
  add_up<false>(x, count, 0, &sum, nullptr);
  const float near = float(sum / double(count));
  add_up<true>(x, count, near, &rest, &squares);
  rest /= double(count);
  *mean = double(near) + rest;
  const double v = squares / double(count) - rest * rest;
  *variance = v < 0 ? 0 : v;  // NaN stays
}

}  // namespace

extern const ElementwiseKernels elementwise_kernels;
const ElementwiseKernels elementwise_kernels = {norm_activation, pooled_difference, moments};

}  // namespace MVK_ISA
}  // namespace mvk
