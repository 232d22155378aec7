// Activations of vectors of floats, several at a time, since one chain of their operations does not fill the arithmetic units.
#pragma once

#include "common/activations.h"
#include "common/simd.h"

namespace mvk {
namespace MVK_ISA {

// In place, rows of so many vectors, `ld` apart.
void activate_rows(Activation f, float* p, int64_t rows, int64_t vectors, int64_t ld);

namespace {

typedef vec<float> vf;

// exp(-|x|)
template <int U>
MVK_INLINE void decay(const vf* x, vf* out) {
  for (int u = 0; u < U; ++u) out[u] = maximum<float>(x[u], -x[u]) * splat(-1.44269504f);
  exp2_nonpositive<U>(out);
}

// x / (1 + exp(-x)), by the exponential that does not overflow.
template <int U>
MVK_INLINE void silu(vf* x) {
  vf e[U];
  decay<U>(x, e);
  for (int u = 0; u < U; ++u) x[u] = x[u] * (x[u] < vf{} ? e[u] : splat(1.0f)) / (splat(1.0f) + e[u]);
}

// x (1 + erf(x / sqrt 2)) / 2. The complement of erf by Abramowitz and Stegun 7.1.26, 1.5e-7 of 1.
template <int U>
MVK_INLINE void gelu(vf* x) {
  vf e[U], t[U], p[U];
  for (int u = 0; u < U; ++u) e[u] = x[u] * x[u] * splat(-0.72134752f);
  exp2_nonpositive<U>(e);
  for (int u = 0; u < U; ++u)
    t[u] = splat(1.0f) / (splat(1.0f) + splat(0.3275911f * 0.70710678f) * maximum<float>(x[u], -x[u]));
  for (int u = 0; u < U; ++u) {
    p[u] = splat(1.061405429f) * t[u] + splat(-1.453152027f);
    p[u] = p[u] * t[u] + splat(1.421413741f);
    p[u] = p[u] * t[u] + splat(-0.284496736f);
    p[u] = p[u] * t[u] + splat(0.254829592f);
    const vf rest = splat(0.5f) * p[u] * t[u] * e[u];  // half of 1 - erf |x / sqrt 2|
    x[u] = x[u] * (x[u] < vf{} ? rest : splat(1.0f) - rest);
  }
}

template <Activation f, int U>
MVK_INLINE void activate(vf* x) {
  if constexpr (f == Activation::silu) silu<U>(x);
  if constexpr (f == Activation::gelu) gelu<U>(x);
  for (int u = 0; u < U; ++u) {
    if constexpr (f == Activation::relu) x[u] = x[u] < vf{} ? vf{} : x[u];
    if constexpr (f == Activation::relu6) {
      const vf low = x[u] < vf{} ? vf{} : x[u];
      x[u] = low > splat(6.0f) ? splat(6.0f) : low;
    }
    if constexpr (f == Activation::hardswish) {
      const vf up = x[u] + splat(3.0f), low = up < vf{} ? vf{} : up;
      x[u] = x[u] * ((low > splat(6.0f) ? splat(6.0f) : low) * splat(1.0f / 6));  // 6 (1 / 6) rounds to 1
    }
  }
}

// call(std::integral_constant<Activation, f>()) for the activation.
template <class Call>
MVK_INLINE void with_activation(Activation f, const Call& call) {
  switch (f) {
    case Activation::relu:
      return call(std::integral_constant<Activation, Activation::relu>{});
    case Activation::silu:
      return call(std::integral_constant<Activation, Activation::silu>{});
    case Activation::hardswish:
      return call(std::integral_constant<Activation, Activation::hardswish>{});
    case Activation::gelu:
      return call(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::relu6:
      return call(std::integral_constant<Activation, Activation::relu6>{});
    default:
      return call(std::integral_constant<Activation, Activation::identity>{});
  }
}

}  // namespace
}  // namespace MVK_ISA
}  // namespace mvk
