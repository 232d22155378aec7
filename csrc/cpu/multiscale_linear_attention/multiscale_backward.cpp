// Multi-scale linear attention on CPUs: the backward.
//
// What the forward's convolutions gave is made again, band by band. Per head: gradients of q, and of the sums over pixels, which
// those of k and v need; through the pointwise convolution into planes; and at last, channel by channel, through all depthwise
// convolutions into the gradient of qkv. Sums for the weights are kept for each unit, and added up in order: no atomics.
#include "common/transpose.h"
#include "multiscale_linear_attention/multiscale_shared.h"

namespace mvk {
namespace MVK_ISA {
namespace {

// A unit's sums for the weights of one scale, in Multiscale::weights.
template <class T>
struct WeightSums {
  T *depthwise, *depthwise_bias, *pointwise, *pointwise_bias;
  WeightSums(const Multiscale& a, int64_t unit, int64_t s) {
    if (s < 0 || s >= a.S) return;
    const int64_t rows = 3 * a.D, k = a.scales[s].k;
    T* at = static_cast<T*>(a.weights) + unit * a.weights_size();
    for (int64_t i = 0; i < s; ++i) at += a.weights_of(i);
    depthwise = at, depthwise_bias = depthwise + rows * k * k;
    pointwise = depthwise_bias + rows, pointwise_bias = pointwise + rows * a.D;
  }
};

template <class T>
static T sum_of(const T* p, int64_t count) {
  vec<T> sum = {};
  int64_t i = 0;
  for (; i + W<T> <= count; i += W<T>) sum += load<T>(p + i);
  if (i < count) sum += load_partial<T>(p + i, int(count - i));
  return lane_sum<T>(sum);
}

// to[i] = the sum of the lanes of vector i.
template <class T>
static void across_lanes(const T* vectors, int64_t count, T* to) {
  for (int64_t i = 0; i < count; i += W<T>) {
    vec<T> rows[W<T>];
    for (int j = 0; j < W<T>; ++j) rows[j] = i + j < count ? load<T>(vectors + (i + j) * W<T>) : vec<T>{};
    add_across<T>(rows);
    store_partial<T>(to + i, rows[0], at_most<T>(count - i));
  }
}

template <class T>
struct Backward {
  static constexpr int64_t kGroup = 16;  // channels that go through the depthwise convolutions together
  const Multiscale& a;
  Scratch<T> s;
  Convolutions<T> convolutions;
  int64_t D, ld;
  T *wide[2], *scale_rows[2], *grads[2], *narrow, *turned, *mixing[3], *x, *step, *lanes, *flipped, *own = nullptr;

  explicit Backward(const Multiscale& args)
      : a(args), s(a.D, a.pixels(), a.eps), convolutions(a), D(a.D), ld(convolutions.ld) {
    const int64_t band = D * ld, k = convolutions.widest(), bytes_of_planes = a.chunks > 1 ? 0 : a.planes_size();
    const int64_t map = a.row_size() + 2 * W<T>, turn_size = round_up(s.N, W<T>) * s.ldk;
    arena.reset(
        s.bytes() + convolutions.bytes() + 7 * Arena::bytes<T>(band) + Arena::bytes<T>(turn_size) +
            3 * Arena::bytes<T>(D * s.ldk) + Arena::bytes<T>(kGroup * map) + Arena::bytes<T>(map) +
            Arena::bytes<T>(k * k * W<T>) + Arena::bytes<T>(k * k) + Arena::bytes<T>(bytes_of_planes),
        a.poison);
    s.take(arena), convolutions.take();
    for (T*& one : wide) one = arena.take<T>(band);
    for (T*& one : scale_rows) one = arena.take<T>(band);
    for (T*& one : grads) one = arena.take<T>(band);
    narrow = arena.take<T>(band), turned = arena.take<T>(turn_size);
    for (T*& one : mixing) one = arena.take<T>(D * s.ldk);
    x = arena.take<T>(kGroup * map), step = arena.take<T>(map);
    lanes = arena.take<T>(k * k * W<T>), flipped = arena.take<T>(k * k);
    if (bytes_of_planes) own = arena.take<T>(bytes_of_planes);
  }

  T* planes(const Part& u) const { return own ? own : static_cast<T*>(a.planes) + u.item * a.planes_size(); }
  T* plane(const Part& u, int64_t scale, int64_t c) const {
    T* at = planes(u) + 3 * D * a.row_size();
    for (int64_t i = 0; i < scale; ++i) at += 3 * D * a.plane_size(a.scales[i].k);
    return at + c * a.plane_size(a.scales[scale].k);
  }
  Head<T> part(const Part& u, int64_t p) const {
    return Head<T>(a.dtype, a.qkv, u.b, 3 * u.h + p, D, a.H, a.W, s.tables[p]);
  }
  Head<T> rows_of_part(const Part& u, int64_t p) const {
    return Head<T>(planes(u) + p * D * a.row_size(), a.row_size(), D, 0, s.tables[p]);
  }
  Head<T> in_band(T* rows, int64_t y, int table) const { return Head<T>(rows, ld, D, y * a.W, s.tables[table]); }
  Head<T> to_band(T* rows, int64_t y) const { return Head<T>(rows, ld, D, y * a.W, s.tables[3]); }

  // Part p's gradient `grad`, of rows y0 .. y1 of a scale, goes back through the pointwise convolution of `from` into planes.
  void through_pointwise(
      const Part& u, int64_t scale, int64_t p, int64_t y0, int64_t y1, const T* from, const T* grad,
      WeightSums<T>& to) {
    const int64_t count = (y1 - y0) * a.W, ldk = s.ldk, k = a.scales[scale].k, pitch = pitch_of(a.W, k);
    for (int64_t n = 0; n < count; n += s.N) {
      const int64_t some = count - n < s.N ? count - n : s.N;
      turn<T>(D, some, from + n, ld, turned, ldk);
      product<T>(D, D, some, grad + n, ld, turned, ldk, mixing[p], ldk, {Start::from});
    }
    for (int64_t o = 0; o < D; ++o) to.pointwise_bias[p * D + o] += sum_of(grad + o * ld, count);
    product_columns<T>(D, count, D, convolutions.weights.pointwise + p * D * D, D, grad, ld, narrow, ld, {Start::zero});
    for (int64_t d = 0; d < D; ++d) {
      T* rows = plane(u, scale, p * D + d);
      for (int64_t y = y0; y < y1; ++y)
        put_row_and_zeros<T>(narrow + d * ld + (y - y0) * a.W, a.W, k / 2, rows + y * pitch);
      if (y1 == a.H)
        for (int64_t i = a.H * pitch; i < a.plane_size(k); ++i) rows[i] = 0;
    }
  }

  // Gradients of q, k and v of a unit.
  void attention(const Part& u) {
    int64_t y0, y1;
    for (int64_t g = 0; g <= a.S; ++g) {
      const Scale* scale = g ? a.scales + g - 1 : nullptr;
      const int64_t group = g * a.heads + u.h, item = u.b * a.groups() + group, stride = (1 + a.S) * a.sums_size();
      const int64_t n0 = u.y0 * a.W, n1 = u.y1 * a.W;
      T* parts = static_cast<T*>(a.partial) + (u.item * a.chunks * (1 + a.S) + g) * a.sums_size();
      if (scale) convolutions.weights.load_head(a, *scale, u.h);
      WeightSums<T> sums(a, u.item * a.chunks + u.chunk, g - 1);
      if (a.stage != Stage::rest) {
        take_sums(
            D, static_cast<const T*>(a.kv) + item * D * D, static_cast<const T*>(a.keys) + item * D, s.sums, s.ldk);
        fill(s.dsums, s.sums_size(), T(0));
        const Head<T> grad(a.dtype, a.grad, u.b, group, D, a.H, a.W, s.tables[1]);
        if (!scale) query_gradients<T>(part(u, 0), grad, rows_of_part(u, 0), n0, n1, s);
        if (scale) start_sums(sums, 0, 1);
        for (Bands bands(a, u); scale && bands.next(y0, y1);) {
          convolutions.run(*scale, u.b, u.h, 0, y0, y1, wide[0], scale_rows[0]);
          query_gradients<T>(in_band(scale_rows[0], y0, 0), grad, to_band(grads[0], y0), y0 * a.W, y1 * a.W, s);
          through_pointwise(u, g - 1, 0, y0, y1, wide[0], grads[0], sums);
        }
        if (scale) end_sums(sums, 0, 1);
      } else {
        merge_sums(D, a.chunks, parts, stride, s.dsums, s.ldk);
      }
      if (a.stage == Stage::sums) {
        T* to = parts + u.chunk * stride;
        give_sums(D, s.dsums, s.ldk, to, to + D * D);
        continue;
      }
      if (!scale) key_gradients<T>(part(u, 1), part(u, 2), rows_of_part(u, 1), rows_of_part(u, 2), n0, n1, s);
      if (scale) start_sums(sums, 1, 3);
      for (Bands bands(a, u); scale && bands.next(y0, y1);) {
        for (int p = 1; p < 3; ++p) convolutions.run(*scale, u.b, u.h, p, y0, y1, wide[p - 1], scale_rows[p - 1]);
        key_gradients<T>(
            in_band(scale_rows[0], y0, 0), in_band(scale_rows[1], y0, 1), to_band(grads[0], y0), to_band(grads[1], y0),
            y0 * a.W, y1 * a.W, s);
        for (int p = 1; p < 3; ++p) through_pointwise(u, g - 1, p, y0, y1, wide[p - 1], grads[p - 1], sums);
      }
      if (scale) end_sums(sums, 1, 3);
    }
  }
  void start_sums(WeightSums<T>& to, int first, int last) {
    for (int p = first; p < last; ++p) {
      fill(mixing[p], D * s.ldk, T(0));
      fill(to.pointwise_bias + p * D, D, T(0));
    }
  }
  void end_sums(WeightSums<T>& to, int first, int last) {
    for (int p = first; p < last; ++p)
      for (int64_t o = 0; o < D; ++o) memcpy(to.pointwise + (p * D + o) * D, mixing[p] + o * s.ldk, D * sizeof(T));
  }

  // A unit's share of the channels, from planes into the gradient of qkv.
  void depthwise(const Part& u) {
    const int64_t pixels = a.pixels(), map = a.row_size() + 2 * W<T>;
    const int64_t end = 3 * D * (u.chunk + 1) / a.chunks;
    for (int64_t c = 3 * D * u.chunk / a.chunks, some; c < end; c += some) {
      const int64_t p = c / D, d = c % D;
      some = end - c < D - d ? end - c : D - d;
      if (some > kGroup) some = kGroup;
      Map in = a.qkv, out = a.dqkv;
      in.data = (Elements(in.data, a.dtype) + d * in.d).data;
      out.data = (Elements(out.data, a.dtype) + d * out.d).data;
      Head<T> from(a.dtype, in, u.b, 3 * u.h + p, some, a.H, a.W, long_table());
      Head<T> to(a.dtype, out, u.b, 3 * u.h + p, some, a.H, a.W, long_table());
      T* sums = planes(u) + c * a.row_size();
      if (a.S) by_blocks([&](int64_t n, int64_t count) { from.panel(false, n, count, x + n, map); });
      for (int64_t scale = 0; scale < a.S; ++scale) {
        const int64_t k = a.scales[scale].k, taps = k * k, pitch = pitch_of(a.W, k);
        WeightSums<T> weights(a, u.item * a.chunks, scale);
        convolutions.weights.load_head(a, a.scales[scale], u.h);
        for (int64_t i = 0; i < some; ++i) {
          const T* grad = plane(u, scale, c + i);
          for (int64_t t = 0; t < taps; ++t) flipped[t] = convolutions.weights.depthwise[(c + i + 1) * taps - 1 - t];
          convolve<T>(k, grad, a.W, 0, a.H, 0, a.H, flipped, T(0), step);
          T* sum = sums + i * a.row_size();
          int64_t n = 0;
          for (; n + W<T> <= pixels; n += W<T>) store<T>(sum + n, load<T>(sum + n) + load<T>(step + n));
          for (; n < pixels; ++n) sum[n] += step[n];
          fill(lanes, taps * W<T>, T(0));
          convolve_weights<T>(k, grad, x + i * map, a.H, a.W, lanes);
          across_lanes(lanes, taps, weights.depthwise + (c + i) * taps);
          weights.depthwise_bias[c + i] = sum_of(grad, a.H * pitch);
        }
      }
      by_blocks([&](int64_t n, int64_t count) { to.put_panel(n, count, sums + n, a.row_size()); });
    }
  }
  // Tables hold the pixels of a block.
  int64_t* long_table() const { return s.tables[0]; }
  template <class F>
  void by_blocks(const F& f) const {
    for (int64_t n = 0; n < a.pixels(); n += s.N) f(n, a.pixels() - n < s.N ? a.pixels() - n : s.N);
  }
};

template <class T>
static void backward(const Multiscale& a, int64_t begin, int64_t end) {
  Backward<T> work(a);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Part u(a, unit);
    if (a.stage != Stage::planes) work.attention(u);
    if (a.stage == Stage::planes || a.stage == Stage::all) work.depthwise(u);
  }
}

// to[i] = the sum over batches (and chunks) of from(unit)[i], in order.
template <class T, class F>
static void add_up(const Multiscale& a, int64_t h, bool chunks, int64_t count, void* to, int64_t at, const F& from) {
  if (!to) return;
  constexpr int64_t most = 64;
  for (int64_t i = 0; i < count; i += most) {
    const int64_t some = count - i < most ? count - i : most, whole = some / W<T> * W<T>;
    T sum[most] = {};
    for (int64_t b = 0; b < a.B; ++b)
      for (int64_t c = 0; c < (chunks ? a.chunks : 1); ++c) {
        const T* p = from((b * a.heads + h) * a.chunks + c) + i;
        for (int64_t n = 0; n < whole; n += W<T>) store<T>(sum + n, load<T>(sum + n) + load<T>(p + n));
        for (int64_t n = whole; n < some; ++n) sum[n] += p[n];
      }
    with_type<T>(a.dtype, [&](auto type) {
      auto* out = static_cast<decltype(type)*>(to) + at + i;
      for (int64_t n = 0; n < whole; n += W<T>) store_as<T>(out + n, load<T>(sum + n));
      for (int64_t n = whole; n < some; ++n) from_float(sum[n], out + n);
    });
  }
}

// Over heads.
template <class T>
static void sum_weights(const Multiscale& a, int64_t begin, int64_t end) {
  for (int64_t h = begin; h < end; ++h)
    for (int64_t s = 0; s < a.S; ++s) {
      const Scale& scale = a.scales[s];
      const int64_t rows = 3 * a.D, taps = scale.k * scale.k;
      auto part = [&](auto member) { return [&, member](int64_t unit) { return WeightSums<T>(a, unit, s).*member; }; };
      using Sums = WeightSums<T>;
      add_up<T>(a, h, false, rows * taps, scale.ddepthwise, h * rows * taps, part(&Sums::depthwise));
      add_up<T>(a, h, false, rows, scale.ddepthwise_bias, h * rows, part(&Sums::depthwise_bias));
      add_up<T>(a, h, true, rows * a.D, scale.dpointwise, h * rows * a.D, part(&Sums::pointwise));
      add_up<T>(a, h, true, rows, scale.dpointwise_bias, h * rows, part(&Sums::pointwise_bias));
    }
}

}  // namespace

extern const MultiscaleBackwardKernels multiscale_backward_kernels;
const MultiscaleBackwardKernels multiscale_backward_kernels = {
    by_dtype<backward<float>, backward<double>>, by_dtype<sum_weights<float>, sum_weights<double>>};

}  // namespace MVK_ISA
}  // namespace mvk
