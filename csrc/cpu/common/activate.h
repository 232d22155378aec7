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

// x / (1 + 2^t), which for -infinity is NaN, as PyTorch's. Dividing is no slower than refining an estimate of the reciprocal: the
// divider works beside the multipliers.
template <int U>
MVK_INLINE void over_one_and_exp2(vf* x, vf* t) {
  exp2_any<U>(t);
  MVK_EACH x[u] = x[u] / (splat(1.0f) + t[u]);
}

// x / (1 + exp(-x))
template <int U>
MVK_INLINE void silu(vf* x) {
  vf t[U];
  MVK_EACH t[u] = x[u] * splat(-1.44269504f);
  over_one_and_exp2<U>(x, t);
}

// x F(x) with the normal distribution F = (1 + erf(x / sqrt 2)) / 2, as x / (1 + 2^(x q(x^2))): the logarithm of (1 - F) / F is odd
// and smooth, and an error of it is multiplied by F (1 - F). q is fitted up to |x| = 5.3, with the weight of that in x F(x), whose
// error it leaves at 8e-8; from there on the logarithm is a line, steep enough.
template <int U>
MVK_INLINE void gelu(vf* x) {
  vf s[U], t[U];
  MVK_EACH s[u] = minimum<float>(splat(5.3f * 5.3f), x[u] * x[u]);
  MVK_EACH t[u] = splat(-5.20101784e-09f) * s[u] + splat(3.84683772e-07f);
  MVK_EACH t[u] = t[u] * s[u] + splat(-1.14470995e-05f);
  MVK_EACH t[u] = t[u] * s[u] + splat(1.59353680e-04f);
  MVK_EACH t[u] = t[u] * s[u] + splat(9.57040076e-05f);
  MVK_EACH t[u] = t[u] * s[u] + splat(-1.04838726e-01f);
  MVK_EACH t[u] = t[u] * s[u] + splat(-2.30220715f);
  MVK_EACH t[u] *= x[u];
  over_one_and_exp2<U>(x, t);
}

// The approximation x (1 + tanh u) / 2 = x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3).
template <int U>
MVK_INLINE void gelu_tanh(vf* x) {
  vf t[U];
  MVK_EACH t[u] = splat(-0.102943240f) * (x[u] * x[u]) + splat(-2.30220820f);
  MVK_EACH t[u] *= x[u];
  over_one_and_exp2<U>(x, t);
}

// Whether it takes an exponential.
constexpr bool exponential(Activation f) {
  return f == Activation::silu || f == Activation::gelu || f == Activation::gelu_tanh;
}

template <Activation f, int U>
MVK_INLINE void activate(vf* x) {
  if constexpr (f == Activation::silu) silu<U>(x);
  if constexpr (f == Activation::gelu_tanh) gelu_tanh<U>(x);
  if constexpr (f == Activation::gelu) gelu<U>(x);
  MVK_EACH {
    if constexpr (f == Activation::relu) x[u] = relu<float>(x[u]);
    if constexpr (f == Activation::relu6) x[u] = minimum<float>(splat(6.0f), relu<float>(x[u]));
    if constexpr (f == Activation::hardswish)  // 6 (1 / 6) rounds to 1
      x[u] *= minimum<float>(splat(6.0f), relu<float>(x[u] + splat(3.0f))) * splat(1.0f / 6);
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
    case Activation::gelu_tanh:
      return call(std::integral_constant<Activation, Activation::gelu_tanh>{});
    case Activation::relu6:
      return call(std::integral_constant<Activation, Activation::relu6>{});
    default:
      return call(std::integral_constant<Activation, Activation::identity>{});
  }
}

}  // namespace
}  // namespace MVK_ISA
}  // namespace mvk
