// Activations of rows in scratch memory, for kernels that have just written them and keep them in L1.
#include "common/activate.h"

namespace mvk {
namespace MVK_ISA {
namespace {

template <Activation f>
MVK_INLINE void activate_rows_of(float* p, int64_t rows, int64_t vectors, int64_t ld) {
  if (rows > 1 && ld == vectors * W<float>) vectors *= rows, rows = 1;
  for (; rows > 0; --rows, p += ld) {
    int64_t v = 0;
    auto some = [&](auto count) __attribute__((always_inline)) {
      constexpr int U = decltype(count)::value;
      vf x[U];
      MVK_EACH x[u] = load<float>(p + (v + u) * W<float>);
      activate<f, U>(x);
      MVK_EACH store<float>(p + (v + u) * W<float>, x[u]);
      v += U;
    };
    while (v + 4 <= vectors) some(std::integral_constant<int, 4>{});
    while (v + 2 <= vectors) some(std::integral_constant<int, 2>{});
    if (v < vectors) some(std::integral_constant<int, 1>{});
  }
}

}  // namespace

void activate_rows(Activation f, float* p, int64_t rows, int64_t vectors, int64_t ld) {
  if (f == Activation::identity) return;
  with_activation(f, [&](auto known) { activate_rows_of<known()>(p, rows, vectors, ld); });
}

}  // namespace MVK_ISA
}  // namespace mvk
