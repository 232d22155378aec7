// Multi-scale linear attention on CPUs: the forward.
//
// For each head and scale, band by band: depthwise and pointwise convolution of k and v, folded into the sums over pixels
// at once; then the same of q, and the output. What the convolutions give is never in memory as a whole.
#include "multiscale_shared.h"

namespace mvk {
namespace MVK_ISA {
namespace {

template <class T, class S>
static void forward(const Multiscale& a, int64_t begin, int64_t end) {
  const int64_t D = a.D;
  Scratch<T> s(D, a.pixels(), a.eps);
  Convolutions<T> convolutions(a);
  const int64_t band = a.S ? D * convolutions.ld : 0;
  arena.reset(s.bytes() + convolutions.bytes() + 3 * Arena::bytes<T>(band), a.poison);
  s.take(), convolutions.take();
  T *wide = arena.take<T>(band), *first = arena.take<T>(band), *second = arena.take<T>(band);

  for (int64_t unit = begin; unit < end; ++unit) {
    const Part u(a, unit);
    for (int64_t g = 0; g <= a.S; ++g) {
      const Scale* scale = g ? a.scales + g - 1 : nullptr;
      T* parts = static_cast<T*>(a.partial) + (u.item * a.chunks * (1 + a.S) + g) * a.sums_size();
      const int64_t stride = (1 + a.S) * a.sums_size(), n0 = u.y0 * a.W, n1 = u.y1 * a.W;
      if (scale) convolutions.weights.template load_head<S>(a, *scale, u.h);
      auto part = [&](int64_t p) {
        return Head<T, const S>(a.qkv, u.b, 3 * u.h + p, D, a.H, a.W, s.tables[p]);
      };
      auto scratch = [&](T* rows, int64_t y, int table) {
        return Head<T, const T>(rows, convolutions.ld, D, y * a.W, s.tables[table]);
      };
      int64_t y0, y1;
      if (a.stage != Stage::rest) {
        fill(s.sums, s.sums_size(), T(0));
        if (!scale) add_sums<T, S>(part(1), part(2), n0, n1, s);
        for (Bands bands(a, u); scale && bands.next(y0, y1);) {
          convolutions.template run<S>(*scale, u.b, u.h, 1, y0, y1, wide, first);
          convolutions.template run<S>(*scale, u.b, u.h, 2, y0, y1, wide, second);
          add_sums<T, T>(scratch(first, y0, 1), scratch(second, y0, 2), y0 * a.W, y1 * a.W, s);
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
      if (u.chunk == 0)
        give_sums(D, s.sums, s.ldk, static_cast<T*>(a.kv) + item * D * D, static_cast<T*>(a.keys) + item * D);
      Head<T, S> out(a.out, u.b, group, D, a.H, a.W, s.tables[1]);
      if (!scale) outputs<T, S, S>(part(0), out, n0, n1, s);
      for (Bands bands(a, u); scale && bands.next(y0, y1);) {
        convolutions.template run<S>(*scale, u.b, u.h, 0, y0, y1, wide, first);
        outputs<T, T, S>(scratch(first, y0, 0), out, y0 * a.W, y1 * a.W, s);
      }
    }
  }
}

}  // namespace

static MVK_BY_DTYPE(Multiscale, forward)

    extern const MultiscaleKernels multiscale_kernels;
const MultiscaleKernels multiscale_kernels = {forward_by_dtype};

}  // namespace MVK_ISA
}  // namespace mvk
