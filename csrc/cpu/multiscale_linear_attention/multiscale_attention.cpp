// Multi-scale linear attention on CPUs: the forward.
//
// For each head and scale, band by band: depthwise and pointwise convolution of k and v, folded into the sums over pixels
// at once; then the same of q, and the output. What the convolutions give is never in memory as a whole.
#include "multiscale_linear_attention/multiscale_shared.h"

namespace mvk {
namespace MVK_ISA {
namespace {

template <class T>
static void forward(const Multiscale& a, int64_t begin, int64_t end) {
  const int64_t D = a.D;
  Scratch<T> s(D, a.pixels(), a.eps);
  Convolutions<T> convolutions(a);
  const int64_t ld = convolutions.ld, band = a.S ? D * ld : 0, turned = a.S ? ld * s.ldk : 0;
  arena.reset(s.bytes() + convolutions.bytes() + 2 * Arena::bytes<T>(band) + Arena::bytes<T>(turned), a.poison);
  s.take(arena), convolutions.take();
  T *wide = arena.take<T>(band), *rows = arena.take<T>(band), *tokens = arena.take<T>(turned);

  for (int64_t unit = begin; unit < end; ++unit) {
    const Part u(a, unit);
    for (int64_t g = 0; g <= a.S; ++g) {
      const Scale* scale = g ? a.scales + g - 1 : nullptr;
      T* parts = static_cast<T*>(a.partial) + (u.item * a.chunks * (1 + a.S) + g) * a.sums_size();
      const int64_t stride = (1 + a.S) * a.sums_size(), n0 = u.y0 * a.W, n1 = u.y1 * a.W;
      if (scale) convolutions.weights.load_head(a, *scale, u.h);
      auto part = [&](int64_t p) { return Head<T>(a.dtype, a.qkv, u.b, 3 * u.h + p, D, a.H, a.W, s.tables[p]); };
      int64_t y0, y1;
      if (a.stage != Stage::rest) {
        fill(s.sums, s.sums_size(), T(0));
        if (!scale) add_sums<T>(part(1), part(2), part(0), n0, n1, s);
        for (Bands bands(a, u); scale && bands.next(y0, y1);) {
          const int64_t count = (y1 - y0) * a.W;
          convolutions.depthwise(*scale, u.b, u.h, 1, y0, y1, wide);
          convolutions.mix_tokens(*scale, 1, count, wide, tokens);
          convolutions.depthwise(*scale, u.b, u.h, 2, y0, y1, wide);
          convolutions.mix_rows(*scale, 2, count, wide, false, rows);
          add_ready_sums<T>(tokens, rows, ld, count, s);
        }
      } else {
        merge_sums(D, a.chunks, parts, stride, s.sums, s.ldk);
      }
      if (a.stage == Stage::sums) {
        T* to = parts + u.chunk * stride;
        give_sums(D, s.sums, s.ldk, to, to + D * D);
        continue;
      }
      const int64_t group = g * a.heads + u.h, item = u.b * a.groups() + group;
      if (u.chunk == 0 && a.kv)
        give_sums(D, s.sums, s.ldk, static_cast<T*>(a.kv) + item * D * D, static_cast<T*>(a.keys) + item * D);
      Head<T> out(a.dtype, a.out, u.b, group, D, a.H, a.W, s.tables[1]);
      if (!scale) outputs<T>(part(0), out, n0, n1, s);
      if (scale && out.last) turn<T>(D, D, s.sums, s.ldk, s.turned, s.ldk);
      for (Bands bands(a, u); scale && bands.next(y0, y1);) {
        const int64_t n = y0 * a.W, count = (y1 - y0) * a.W, step = s.step(count);
        convolutions.depthwise(*scale, u.b, u.h, 0, y0, y1, wide);
        if (out.last)
          convolutions.mix_tokens(*scale, 0, count, wide, tokens);
        else
          convolutions.mix_rows(*scale, 0, count, wide, true, rows);
        for (int64_t i = 0; i < count; i += step) {
          const int64_t some = count - i < step ? count - i : step;
          Next none;
          if (out.last)
            output_tokens<T>(tokens + i * s.ldk, n + i, some, out, s, none);
          else
            output_rows<T>(rows + i, ld, n + i, some, out, s, none);
        }
      }
    }
  }
}

}  // namespace

extern const MultiscaleKernels multiscale_kernels;
const MultiscaleKernels multiscale_kernels = {by_dtype<forward<float>, forward<double>>};

}  // namespace MVK_ISA
}  // namespace mvk
