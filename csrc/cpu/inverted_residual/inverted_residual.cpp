// The inverted residual on CPUs: 1x1 expansion, depthwise convolution, 1x1 projection, on maps whose channels are side by side.
//
// A unit is a run of output rows. Hidden channels are taken in panels, two vectors wide. Of each panel a ring of expanded rows
// is kept: the rows that the next few output rows need, with the padding's zeros at both ends, so that the tiles of the
// expansion write it and the depthwise convolution reads it contiguously. What the convolution gives for some panels is the
// left factor of the projection, which sums over such groups of panels in the output. The hidden map, four or six times as
// large as the block's input, never leaves L2, unless there is no projection and it is the result; input and output move once, weights once for each strip of rows.
#include "inverted_residual/inverted_residual.h"

#include "common/activate.h"
#include "common/arena.h"
#include "common/packed.h"

namespace mvk {
namespace MVK_ISA {
namespace {

constexpr int64_t kRows = 64;         // pixels of a strip, at least: rows of the products
constexpr int64_t kRing = 512 << 10;  // bytes of all rings, at most, if a strip has more than one row
constexpr int64_t kGroup = 64 << 10;  // bytes of a group of panels before the projection
constexpr int64_t kChannels = 256;    // and channels of it, one chain of sums

static void pack(const InvertedResidualWeights& w) {
  const InvertedResidualSizes& s = w.sizes;
  pack_sizes(s, w.packed);
  if (s.expands) {
    pack_panels(w.expand, s.hidden, s.inputs, w.packed + s.expand());
    pack_bias(w.expand_bias, s.hidden, w.packed + s.expand_bias());
  }
  pack_panels(w.depthwise, s.hidden, s.kernel * s.kernel, w.packed + s.depthwise());
  pack_bias(w.depthwise_bias, s.hidden, w.packed + s.depthwise_bias());
  pack_panels(w.project, s.outputs, s.hidden, w.packed + s.project());
  pack_bias(w.project_bias, s.outputs, w.packed + s.project_bias());
}

// One row of the depthwise convolution, activated, for one vector of channels: `from` are the K rows that it reads, pixels P
// apart, weights P apart; results are `ld` apart.
template <int K, int S, Activation f>
static void depthwise_row(
    const float* const* from, const float* weights, vf bias, int64_t width, float* to, int64_t ld) {
  constexpr int U = K == 3 ? 4 : kVectorBytes == 64 ? 8 : 6;  // pixels at a time: sums that stay in registers
  vf w[K * K];
  if constexpr (K == 3) {
#pragma GCC unroll 9
    for (int i = 0; i < K * K; ++i) w[i] = load<float>(weights + i * P);
  }
  auto some = [&](auto count, int64_t x) __attribute__((always_inline)) {
    constexpr int n = decltype(count)::value;
    vf sum[n];
#pragma GCC unroll 8
    for (int u = 0; u < n; ++u) sum[u] = bias;
#pragma GCC unroll 5
    for (int i = 0; i < K; ++i) {
      const float* p = from[i] + x * S * P;
#pragma GCC unroll 5
      for (int j = 0; j < K; ++j) {
        const vf tap = K == 3 ? w[i * K + j] : load<float>(weights + (i * K + j) * P);
#pragma GCC unroll 8
        for (int u = 0; u < n; ++u) sum[u] += load<float>(p + (u * S + j) * P) * tap;
      }
    }
    activate<f, n>(sum);
#pragma GCC unroll 8
    for (int u = 0; u < n; ++u) store<float>(to + (x + u) * ld, sum[u]);
  };
  int64_t x = 0;
  for (; x + U <= width; x += U) some(std::integral_constant<int, U>{}, x);
  for (; x + 2 <= width; x += 2) some(std::integral_constant<int, 2>{}, x);
  if (x < width) some(std::integral_constant<int, 1>{}, x);
}

// What a unit needs to know of its block.
struct Block {
  const InvertedResidual& a;
  const InvertedResidualSizes& s;
  int64_t pad, panels, strip, ring_rows, row_size, group, lda;

  explicit Block(const InvertedResidual& a)
      : a(a), s(a.sizes), pad(s.kernel / 2), panels(s.panels(s.hidden)), row_size((a.W + s.kernel - 1) * P) {
    strip = (kRows + a.Wo - 1) / a.Wo;
    if (strip > a.Ho) strip = a.Ho;
    while (strip > 1 && rows_of(strip) * row_size * panels * int64_t(sizeof(float)) > kRing) --strip;
    ring_rows = rows_of(strip);
    group = kGroup / (strip * a.Wo * P * int64_t(sizeof(float)));
    if (group > kChannels / P) group = kChannels / P;
    if (group > panels) group = panels;
    if (group < 1) group = 1;
    lda = leading<float>(group * P);
  }
  int64_t rows_of(int64_t outputs) const { return (outputs - 1) * a.stride + s.kernel; }
};

// Dynamic ReLU: max(slope 0 * x, slope 1 * x) of a panel's rows. The slopes of all channels follow each other, those of each kind
// in whole panels.
static void bend_rows(const Block& k, const float* slopes, int64_t panel, float* p, int64_t rows, int64_t ld) {
  const float *first = slopes + panel * P, *second = first + k.panels * P;
  for (int64_t v = 0; v < vectors_of(k.s.hidden, panel); ++v) {
    const vf a = load<float>(first + v * W<float>), b = load<float>(second + v * W<float>);
    float* at = p + v * W<float>;
    for (int64_t i = 0; i < rows; ++i, at += ld) {
      const vf x = load<float>(at);
      store<float>(at, maximum<float>(a * x, b * x));
    }
  }
}

// The slopes of a picture, (2, hidden), with zeros after the last channels.
static const float* padded_slopes(const Block& k, const float* slopes, int64_t picture, float* to) {
  if (!slopes) return nullptr;
  const int64_t ld = k.panels * P;
  memset(to, 0, 2 * ld * sizeof(float));
  for (int64_t i = 0; i < 2; ++i)
    memcpy(to + i * ld, slopes + (picture * 2 + i) * k.s.hidden, k.s.hidden * sizeof(float));
  return to;
}

// Row y of the input, expanded and activated, or as it is, into the ring of a panel.
static void expand_row(
    const Block& k, const float* x, int64_t panel, const float* slopes, float* to, NextWeights& next) {
  const InvertedResidualSizes& s = k.s;
  const int64_t vectors = vectors_of(s.hidden, panel);
  if (!s.expands) {
    const int64_t channels = s.hidden - panel * P;
    for (int64_t i = 0; i < k.a.W; ++i)
      take_row<float>(x + i * k.a.in.x + panel * P, channels < P ? channels : P, to + i * P);
    return;
  }
  const float* w = k.a.packed + s.expand() + panel * P * s.inputs;
  End<float> end;
  end.bias = k.a.packed + s.expand_bias() + panel * P;
  product_in_parts<float>(int(vectors), k.a.W, s.inputs, x, k.a.in.x, w, P, to, P, end, next);
  activate_rows(k.a.before, to, k.a.W, vectors, P);
  if (slopes) bend_rows(k, slopes, panel, to, k.a.W, P);
}

// One row of the output for a panel, whose pixels are `ld` apart.
static void depthwise(
    const Block& k, const float* const* from, int64_t panel, const float* slopes, float* to, int64_t ld) {
  const InvertedResidualSizes& s = k.s;
  const float* w = k.a.packed + s.depthwise() + panel * P * s.kernel * s.kernel;
  const float* bias = k.a.packed + s.depthwise_bias() + panel * P;
  const int64_t vectors = vectors_of(s.hidden, panel);
  with_activation(k.a.activation, [&](auto known) {
    // With 16 registers the weights and an exponential's vectors push each other out: then it has its own pass.
    constexpr bool many = kVectorBytes == 64 || !exponential(known());
    constexpr Activation f = many ? known() : Activation::identity;
    auto row = s.kernel == 3 ? (k.a.stride == 1 ? depthwise_row<3, 1, f> : depthwise_row<3, 2, f>)
                             : (k.a.stride == 1 ? depthwise_row<5, 1, f> : depthwise_row<5, 2, f>);
    for (int64_t v = 0; v < vectors; ++v) {
      const float* rows[5];
      for (int64_t i = 0; i < s.kernel; ++i) rows[i] = from[i] + v * W<float>;
      row(rows, w + v * W<float>, load<float>(bias + v * W<float>), k.a.Wo, to + v * W<float>, ld);
    }
    if (!many) activate_rows(k.a.activation, to, k.a.Wo, vectors, ld);
  });
  if (slopes) bend_rows(k, slopes, panel, to, k.a.Wo, ld);
}

// The same into a map that has the hidden channels, by the way of `row` where they do not fill the panel's vectors.
static void depthwise_to_map(
    const Block& k, const float* const* from, int64_t panel, const float* slopes, float* row, float* to) {
  const int64_t channels = k.s.hidden - panel * P, some = channels < P ? channels : P;
  to += panel * P;
  if (some == vectors_of(k.s.hidden, panel) * W<float>) return depthwise(k, from, panel, slopes, to, k.a.out.x);
  depthwise(k, from, panel, slopes, row, k.lda);
  for (int64_t i = 0; i < k.a.Wo; ++i) put_channels(row + i * k.lda, some, nullptr, to + i * k.a.out.x);
}

// Output rows y0 .. y1 (+)= the panels g0 .. g1 of the hidden channels times their rows of the projection. Whole vectors of
// channels go straight to the map, what is left of a vector by the way of `rest`.
static void project(
    const Block& k, int64_t g0, int64_t g1, int64_t y0, int64_t y1, const float* x, const float* group, float* rest,
    float* out, Stretch following) {
  const InvertedResidual& a = k.a;
  const InvertedResidualSizes& s = k.s;
  const int64_t channels = (g1 * P < s.hidden ? g1 * P : s.hidden) - g0 * P;
  const int64_t whole = s.outputs / W<float> * W<float>;
  const bool first = g0 == 0, last = g1 == k.panels;
  // Rows of the picture that follow each other in memory are the rows of one product.
  const bool joined = a.out.y == a.Wo * a.out.x && (!a.residual || a.in.y == a.W * a.in.x);
  const int64_t lines = joined ? y1 - y0 : 1, pixels = lines * a.Wo;
  for (int64_t panel = 0; panel < s.panels(s.outputs); ++panel) {
    const float* w = a.packed + s.project() + panel * P * s.hidden + g0 * P * P;
    const float* bias = a.packed + s.project_bias() + panel * P;
    NextWeights next(
        (y1 - y0) / lines * ((pixels + kTileRows - 1) / kTileRows),
        panel + 1 < s.panels(s.outputs) ? panel_at(w + P * s.hidden, channels) : following);
    const int64_t some = whole - panel * P, vectors = some < P ? some / W<float> : 2;
    for (int64_t y = y0; y < y1; y += lines) {
      const float* in = group + (y - y0) * a.Wo * k.lda;
      const float* same = x + y * a.in.y + panel * P;
      float* to = out + y * a.out.y + panel * P;
      End<float> end{start_if(!first)};
      if (first) end.bias = bias;
      if (vectors) {
        End<float> here = end;
        if (last && a.residual) here.plus = same, here.ldp = a.in.x;
        product_rows<float>(int(vectors), pixels, channels, in, k.lda, w, P, to, a.out.x, here, next);
      }
      if (vectors == 2 || some == s.outputs - panel * P) continue;
      const int64_t at = vectors * W<float>;
      float* left = rest + (y - y0) * a.Wo * W<float>;
      product_rows<float>(1, pixels, channels, in, k.lda, w + at, P, left, W<float>, end.at(at));
      if (!last) continue;
      const int count = int(s.outputs - whole);
      for (int64_t i = 0; i < pixels; ++i)
        put_channels(left + i * W<float>, count, a.residual ? same + i * a.in.x + at : nullptr, to + i * a.out.x + at);
    }
  }
}

static void forward(const InvertedResidual& a, int64_t begin, int64_t end) {
  const Block k(a);
  const InvertedResidualSizes& s = a.sizes;
  const int64_t rings = k.panels * k.ring_rows * k.row_size, pixels = k.strip * a.Wo;
  arena.reset(
      Arena::bytes<float>(k.row_size) + Arena::bytes<float>(rings) + Arena::bytes<float>(pixels * k.lda) +
          Arena::bytes<float>(pixels * W<float>) + Arena::bytes<float>(4 * k.panels * P),
      a.poison);
  float* zeros = arena.take<float>(k.row_size);
  float* ring = arena.take<float>(rings);
  float* group = arena.take<float>(pixels * k.lda);
  float* rest = arena.take<float>(pixels * W<float>);
  float* slopes = arena.take<float>(4 * k.panels * P);
  memset(zeros, 0, k.row_size * sizeof(float));
  for (int64_t i = 0; i < k.panels * k.ring_rows; ++i) {
    memset(ring + i * k.row_size, 0, k.pad * P * sizeof(float));
    memset(ring + (i + 1) * k.row_size - k.pad * P, 0, k.pad * P * sizeof(float));
  }
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t picture = unit / a.chunks, chunk = unit % a.chunks;
    const int64_t first = a.Ho * chunk / a.chunks, last = a.Ho * (chunk + 1) / a.chunks;
    const float* x = a.in.data + picture * a.in.b;
    const float* slopes_before = padded_slopes(k, a.slopes_before, picture, slopes);
    const float* slopes_after = padded_slopes(k, a.slopes, picture, slopes + 2 * k.panels * P);
    float* out = a.out.data + picture * a.out.b;
    int64_t done = first * a.stride - k.pad;  // the rows before this one are in the rings, if they are needed
    if (done < 0) done = 0;
    for (int64_t y0 = first; y0 < last; y0 += k.strip) {
      const int64_t y1 = y0 + k.strip < last ? y0 + k.strip : last;
      int64_t need = (y1 - 1) * a.stride + s.kernel - k.pad;
      if (need > a.H) need = a.H;
      for (int64_t g = 0; g < k.panels; g += k.group) {
        const int64_t g1 = g + k.group < k.panels ? g + k.group : k.panels;
        for (int64_t panel = g; panel < g1; ++panel) {
          float* rows = ring + panel * k.ring_rows * k.row_size;
          const bool more = s.expands && panel + 1 < k.panels;
          NextWeights next(
              (need - done) * tiles_of(2, a.W, s.inputs),
              panel_at(a.packed + s.expand() + (panel + 1) * P * s.inputs, more ? s.inputs : 0),
              panel_at(a.packed + s.project() + g * P * P, panel + 1 == g1 && s.outputs ? (g1 - g) * P : 0));
          for (int64_t y = done; y < need; ++y)
            expand_row(k, x + y * a.in.y, panel, slopes_before, rows + y % k.ring_rows * k.row_size + k.pad * P, next);
          for (int64_t y = y0; y < y1; ++y) {
            const float* from[5];
            for (int64_t i = 0; i < s.kernel; ++i) {
              const int64_t at = y * a.stride - k.pad + i;
              from[i] = at < 0 || at >= a.H ? zeros : rows + at % k.ring_rows * k.row_size;
            }
            if (s.outputs)
              depthwise(k, from, panel, slopes_after, group + (y - y0) * a.Wo * k.lda + (panel - g) * P, k.lda);
            else
              depthwise_to_map(k, from, panel, slopes_after, group, out + y * a.out.y);
          }
        }
        const bool ends = unit + 1 == end && y1 == last && g1 == k.panels;
        if (s.outputs) project(k, g, g1, y0, y1, x, group, rest, out, ends ? a.following : Stretch{});
      }
      done = need;
    }
  }
}

}  // namespace

extern const InvertedResidualKernels inverted_residual_kernels;
const InvertedResidualKernels inverted_residual_kernels = {P, pack, forward};

}  // namespace MVK_ISA
}  // namespace mvk
