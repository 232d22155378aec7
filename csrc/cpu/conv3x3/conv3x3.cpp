// Dense 3x3 convolution on CPUs, on maps whose channels are side by side: by Winograd's algorithm, or direct.
//
// Winograd: for a block of tiles the inputs are transformed, V [point][tile][channel], multiplied by the weights' transforms, point by
// point, M [point][tile][channel], and transformed back. V and M stay in L2; the weights are read once for each block, input and
// output once. Direct: for a strip of output rows the input rows are copied, with zeros around and both maps' channels together,
// so that the three taps of a row are one run of 3 C factors.
#include "conv3x3/conv3x3.h"

#include "common/packed.h"
#include "conv3x3/winograd.h"

namespace mvk {
namespace MVK_ISA {
namespace {

constexpr int64_t kBlock = 512 << 10;  // bytes of V and M
constexpr int64_t kRows = 64;          // pixels of a strip, at least
constexpr int64_t kFew = 64;           // taps times channels of one sum, at most

template <int m>
static void transform_weights(const Conv3x3Sizes& s, const float* weight, float* packed) {
  constexpr int n = m + 2;
  double g[n][3];
  of_weights<m>(g);
  for (int64_t o = 0; o < s.panels() * P; ++o)
    for (int64_t c = 0; c < s.inputs; ++c) {
      const float* w = weight + (o * s.inputs + c) * 9;
      double half[n][3];
      for (int i = 0; i < n; ++i)
        for (int j = 0; j < 3; ++j) {
          half[i][j] = 0;
          for (int k = 0; k < 3 && o < s.outputs; ++k) half[i][j] += g[i][k] * double(w[k * 3 + j]);
        }
      for (int i = 0; i < n; ++i)
        for (int j = 0; j < n; ++j) {
          double sum = 0;
          for (int k = 0; k < 3; ++k) sum += half[i][k] * g[j][k];
          packed[(((i * n + j) * s.panels() + o / P) * s.inputs + c) * P + o % P] = float(sum);
        }
    }
}

static void pack(const Conv3x3Sizes& s, const float* weight, const float* bias, float* packed) {
  pack_sizes(s, packed);
  pack_bias(bias, s.outputs, packed + s.bias());
  float* to = packed + s.weights();
  if (s.tile == 2) return transform_weights<2>(s, weight, to);
  if (s.tile == 4) return transform_weights<4>(s, weight, to);
  for (int64_t o = 0; o < s.panels() * P; ++o)
    for (int64_t tap = 0; tap < 9; ++tap)
      for (int64_t c = 0; c < s.inputs; ++c)
        to[((o / P * 9 + tap) * s.inputs + c) * P + o % P] = o < s.outputs ? weight[(o * s.inputs + c) * 9 + tap] : 0;
}

// One picture of a call.
struct Picture {
  const Conv3x3& a;
  const float *in, *beside;
  float *residual, *out;
  Picture(const Conv3x3& a, int64_t b)
      : a(a),
        in(a.in.data + b * a.in.b),
        beside(a.beside.data ? a.beside.data + b * a.beside.b : nullptr),
        residual(a.residual.data ? a.residual.data + b * a.residual.b : nullptr),
        out(a.out.data + b * a.out.b) {}

  // The pixels of the output, and of the residual, from this one on.
  PixelRows to(int64_t y, int64_t x) const { return {out + y * a.out.y + x * a.out.x, a.out.x}; }
  PixelRows plus(int64_t y, int64_t x) const {
    return {residual ? residual + y * a.residual.y + x * a.residual.x : nullptr, a.residual.x};
  }
};

// ---- Winograd ----

// Transforms the inputs of one tile whose first is (y, x): `channels` of a map, to[point * ld] for each vector of them.
template <int m>
static void transform_inputs(
    const PixelMap& map, const float* from, int64_t channels, int64_t height, int64_t width, int64_t y, int64_t x,
    float* to, int64_t ld) {
  constexpr int n = m + 2;
  const bool inside = y >= 0 && x >= 0 && y + n <= height && x + n <= width;
  for (int64_t c = 0; c < channels; c += W<float>) {
    const int some = at_most<float>(channels - c);
    vf d[n][n], column[n], result[n];
    for (int i = 0; i < n; ++i) {
      vf row[n];
      for (int j = 0; j < n; ++j) {
        const bool there = inside || (y + i >= 0 && y + i < height && x + j >= 0 && x + j < width);
        const float* p = from + (y + i) * map.y + (x + j) * map.x + c;
        row[j] = !there ? vf{} : some == W<float> ? load<float>(p) : load_partial<float>(p, some);
      }
      of_inputs<m>(row, d[i]);
    }
    for (int j = 0; j < n; ++j) {
      for (int i = 0; i < n; ++i) column[i] = d[i][j];
      of_inputs<m>(column, result);
      for (int i = 0; i < n; ++i) store<float>(to + (i * n + j) * ld + c, result[i]);
    }
  }
}

// The outputs of one tile, [pixel][channel], from its products, [point * ld][channel].
template <int m>
static void transform_products(
    int64_t channels, const float* from, int64_t ld, const float* bias, float* to, int64_t ldo) {
  constexpr int n = m + 2;
  for (int64_t c = 0; c < channels; c += W<float>) {
    const vf b = load<float>(bias + c);
    vf d[m][n], column[n], result[m];
    for (int j = 0; j < n; ++j) {
      for (int i = 0; i < n; ++i) column[i] = load<float>(from + (i * n + j) * ld + c);
      of_products<m>(column, result);
      for (int i = 0; i < m; ++i) d[i][j] = result[i];
    }
    for (int i = 0; i < m; ++i) {
      of_products<m>(d[i], result);
      for (int j = 0; j < m; ++j) store<float>(to + (i * m + j) * ldo + c, result[j] + b);
    }
  }
}

template <int m>
static void winograd(const Conv3x3& a, int64_t begin, int64_t end) {
  constexpr int n = m + 2;
  const Conv3x3Sizes& s = a.sizes;
  const int64_t high = (a.H + m - 1) / m, wide = (a.W + m - 1) / m, tiles = high * wide;
  const int64_t ldv = leading<float>(s.inputs + W<float>), ldm = leading<float>(s.panels() * P);
  int64_t block = kBlock / (n * n * (ldv + ldm) * int64_t(sizeof(float)));
  if (block < 12) block = 12;
  const int64_t most = (tiles + a.chunks - 1) / a.chunks;
  const int64_t blocks = (most + block - 1) / block;
  block = (most + blocks - 1) / blocks;
  arena.reset(
      Arena::bytes<float>(n * n * block * ldv) + Arena::bytes<float>(n * n * block * ldm) +
          Arena::bytes<float>(m * m * ldm),
      a.poison);
  float* v = arena.take<float>(n * n * block * ldv);
  float* products = arena.take<float>(n * n * block * ldm);
  float* pixels = arena.take<float>(m * m * ldm);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Picture picture(a, unit / a.chunks);
    const int64_t chunk = unit % a.chunks, last = tiles * (chunk + 1) / a.chunks;
    for (int64_t t0 = tiles * chunk / a.chunks; t0 < last; t0 += block) {
      const int64_t count = t0 + block < last ? block : last - t0;
      for (int64_t t = 0; t < count; ++t) {
        const int64_t y = (t0 + t) / wide * m - 1, x = (t0 + t) % wide * m - 1;
        float* to = v + t * ldv;
        transform_inputs<m>(a.in, picture.in, a.first, a.H, a.W, y, x, to, block * ldv);
        if (picture.beside)
          transform_inputs<m>(a.beside, picture.beside, s.inputs - a.first, a.H, a.W, y, x, to + a.first, block * ldv);
      }
      const Stretch after = unit + 1 == end && t0 + block >= last ? a.following : Stretch{};
      for (int64_t point = 0; point < n * n; ++point)
        for (int64_t panel = 0; panel < s.panels(); ++panel) {
          const int vectors = vectors_of(s.outputs, panel);
          const float* w = a.packed + s.weights() + (point * s.panels() + panel) * s.inputs * P;
          const bool more = point < n * n - 1 || panel < s.panels() - 1;
          NextWeights next(tiles_of(vectors, count, s.inputs), more ? panel_at(w + s.inputs * P, s.inputs) : after);
          product_in_parts<float>(
              vectors, count, s.inputs, v + point * block * ldv, ldv, w, P, products + point * block * ldm + panel * P,
              ldm, {}, next);
        }
      for (int64_t t = 0; t < count; ++t) {
        const int64_t y = (t0 + t) / wide * m, x = (t0 + t) % wide * m;
        transform_products<m>(s.outputs, products + t * ldm, block * ldm, a.packed + s.bias(), pixels, ldm);
        activate_rows(a.activation, pixels, m * m, (s.outputs + W<float> - 1) / W<float>, ldm);
        for (int i = 0; i < m && y + i < a.H; ++i)
          for (int j = 0; j < m && x + j < a.W; ++j)
            put_channels(
                pixels + (i * m + j) * ldm, s.outputs, picture.plus(y + i, x + j).data, picture.to(y + i, x + j).data);
      }
    }
  }
}

// ---- direct ----

// How a row of the input, between zeros, lies in scratch memory: channel c of the pixel x at x * pixel + c * channel.
struct Line {
  int64_t size, pixel, channel;
  // Planes stay planes, if they are few.
  explicit Line(const Conv3x3& a) : size((a.W + 2) * a.sizes.inputs) {
    const bool planes = a.in.c != 1 && !a.beside.data && 9 * a.sizes.inputs <= kFew;
    pixel = planes ? 1 : a.sizes.inputs, channel = planes ? a.W + 2 : 1;
  }
};

// Row y of the input, or zeros if there is no such row.
static void copy_row(const Picture& picture, const Line& line, int64_t y, float* to) {
  const Conv3x3& a = picture.a;
  if (y < 0 || y >= a.H) {
    memset(to, 0, line.size * sizeof(float));
    return;
  }
  const int64_t C = a.sizes.inputs, right = (a.W + 1) * line.pixel;
  if (line.channel == 1) {
    memset(to, 0, C * sizeof(float));
    memset(to + right, 0, C * sizeof(float));
  }
  for (int64_t c = 0; line.channel != 1 && c < C; ++c) to[c * line.channel] = to[c * line.channel + right] = 0;
  auto copy = [&](const PixelMap& map, const float* from, int64_t channels, float* dst) {
    from += y * map.y;
    if (map.c == 1 && line.channel == 1) {
      for (int64_t x = 0; x < a.W; ++x) memcpy(dst + x * line.pixel, from + x * map.x, channels * sizeof(float));
      return;
    }
    for (int64_t c = 0; c < channels; ++c) {
      const float* p = from + c * map.c;
      float* q = dst + c * line.channel;
      if (map.x == 1 && line.pixel == 1)
        memcpy(q, p, a.W * sizeof(float));
      else
        for (int64_t x = 0; x < a.W; ++x) q[x * line.pixel] = p[x * map.x];
    }
  };
  copy(a.in, picture.in, a.first, to + line.pixel);
  if (picture.beside) copy(a.beside, picture.beside, C - a.first, to + line.pixel + a.first * line.channel);
}

// M pixels, `step` apart, by V vectors of outputs: the taps of a pixel are at the offsets.
template <int M, int V>
static void gathered(
    const float* from, int64_t step, int64_t taps, const int64_t* offsets, const float* w, const float* bias,
    float* to) {
  vf sum[M][V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) sum[m][v] = load<float>(bias + v * W<float>);
  for (int64_t k = 0; k < taps; ++k, w += P) {
    const float* p = from + offsets[k];
    vf b[V];
    for (int v = 0; v < V; ++v) b[v] = load<float>(w + v * W<float>);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const vf x = splat(p[m * step]);
      for (int v = 0; v < V; ++v) sum[m][v] += x * b[v];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) store<float>(to + m * P + v * W<float>, sum[m][v]);
}
template <int V>
static void gathered_row(
    const float* from, int64_t step, int64_t taps, const int64_t* offsets, const float* w, const float* bias,
    int64_t width, float* to) {
  constexpr int M = V == 1 ? 12 : kTileRows;
  int64_t x = 0;
  for (; x + M <= width; x += M) gathered<M, V>(from + x * step, step, taps, offsets, w, bias, to + x * P);
  for (; x < width; ++x) gathered<1, V>(from + x * step, step, taps, offsets, w, bias, to + x * P);
}

static void direct(const Conv3x3& a, int64_t begin, int64_t end) {
  const Conv3x3Sizes& s = a.sizes;
  const Line line(a);
  const int64_t C = s.inputs, taps = 3 * C;
  // Of few channels, the products of a pixel's taps are one sum over a table of offsets.
  const bool few = 3 * taps <= kFew;
  int64_t strip = (kRows + a.Wo - 1) / a.Wo;
  if (strip > a.Ho) strip = a.Ho;
  const int64_t lines = (strip - 1) * a.stride + 3;
  arena.reset(
      Arena::bytes<float>(lines * line.size) + Arena::bytes<float>(a.Wo * P) + Arena::bytes<int64_t>(3 * taps),
      a.poison);
  float* rows = arena.take<float>(lines * line.size);
  float* result = arena.take<float>(a.Wo * P);
  int64_t* offsets = arena.take<int64_t>(3 * taps);
  for (int64_t k = 0; k < 3 * taps; ++k)
    offsets[k] = k / taps * line.size + k / C % 3 * line.pixel + k % C * line.channel;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Picture picture(a, unit / a.chunks);
    const int64_t chunk = unit % a.chunks, last = a.Ho * (chunk + 1) / a.chunks;
    for (int64_t y0 = a.Ho * chunk / a.chunks; y0 < last; y0 += strip) {
      const int64_t y1 = y0 + strip < last ? y0 + strip : last;
      for (int64_t i = 0; i < (y1 - y0 - 1) * a.stride + 3; ++i)
        copy_row(picture, line, y0 * a.stride - 1 + i, rows + i * line.size);
      for (int64_t y = y0; y < y1; ++y) {
        const float* first = rows + (y - y0) * a.stride * line.size;
        const Stretch after = unit + 1 == end && y + 1 == last ? a.following : Stretch{};
        for (int64_t panel = 0; panel < s.panels(); ++panel) {
          const float* w = a.packed + s.weights() + panel * 9 * C * P;
          const int64_t channels = s.outputs - panel * P < P ? s.outputs - panel * P : P;
          const int vectors = vectors_of(s.outputs, panel);
          End<float> sum, biased;
          biased.bias = a.packed + s.bias() + panel * P;
          if (few) {
            auto row = vectors == 1 ? gathered_row<1> : gathered_row<2>;
            row(first, a.stride * line.pixel, 3 * taps, offsets, w, biased.bias, a.Wo, result);
          }
          const bool more = panel + 1 < s.panels();
          NextWeights next(3 * tiles_of(vectors, a.Wo, taps), more ? panel_at(w + 9 * C * P, few ? 0 : 9 * C) : after);
          for (int64_t i = 0; !few && i < 3; ++i) {
            sum.start = biased.start = start_if(i > 0);
            product_in_parts<float>(
                vectors, a.Wo, taps, first + i * line.size, a.stride * C, w + i * taps * P, P, result, P,
                i == 2 ? biased : sum, next);
          }
          put_panel(
              a.activation, result, a.Wo, channels, picture.plus(y, 0).at(panel * P), picture.to(y, 0).at(panel * P));
        }
      }
    }
  }
}

static void forward(const Conv3x3& a, int64_t begin, int64_t end) {
  return a.sizes.tile == 4   ? winograd<4>(a, begin, end)
         : a.sizes.tile == 2 ? winograd<2>(a, begin, end)
                             : direct(a, begin, end);
}

}  // namespace

extern const Conv3x3Kernels conv3x3_kernels;
const Conv3x3Kernels conv3x3_kernels = {P, pack, forward};

}  // namespace MVK_ISA
}  // namespace mvk
