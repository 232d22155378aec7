// The element-wise kernels around attention as boxed operators. Included by the files that register them alone.
#pragma once

#include <cmath>

#include "common/tensor.h"
#include "elementwise/elementwise.h"
#include "instruction_sets.h"

namespace mvk {
namespace {

// Of what a norm over pictures is to a product: factors of the channels, what is subtracted first, what is added then.
constexpr int64_t kPlanes = 3;

// Dense in one of the two layouts that convolutions give.
bool dense(const Tensor& t, bool channels_last) {
  const int64_t *n = t.sizes(), *s = t.strides();
  const int64_t c = channels_last ? 1 : n[2] * n[3], x = channels_last ? n[1] : 1;
  const int64_t wanted[4] = {n[1] * n[2] * n[3], c, x * n[3], x};
  for (int i = 0; i < 4; ++i)
    if (n[i] != 1 && s[i] != wanted[i]) return false;
  return true;
}

Maps maps(const Tensor& x, const Tensor& out, const char* op) {
  const bool single = x.dtype() == float32();
  require(x.dim() == 4 && single, op, "a float32 map of 4 axes is wanted");
  const bool first = dense(x, false);
  require(first || dense(x, true), op, "a dense map is wanted");
  const int64_t* n = x.sizes();
  const auto* in = static_cast<const float*>(x.data());
  return {in, static_cast<float*>(out.data()), n[0], n[1], n[2], n[3], !first};
}

Tensor empty_as(const Tensor& x) {
  return empty({x.sizes(), x.sizes() + x.dim()}, {x.strides(), x.strides() + x.dim()}, x.dtype());
}

// Runs a kernel over all units of so many FLOPs an element.
template <class Kernel>
void over(const Maps& m, double flops, const Kernel& kernel) {
  if (m.units() && m.unit_size()) parallel(m.units(), grain(flops * double(m.unit_size())), kernel);
}

// Settings of a channel each, or null.
const float* per_channel(const Tensor& t, int64_t channels) {
  if (!t) return nullptr;
  const bool fits = t.dim() == 1 && t.sizes()[0] == channels && (channels == 1 || t.strides()[0] == 1);
  require(fits && t.dtype() == float32(), "norm_activation", "parameters do not fit");
  return static_cast<const float*>(t.data());
}

// settings: mean, var, weight, bias, bias of the convolution, eps, activation
void run_norm_activation(const Tensor& x, const Tensor& out, Value* settings) {
  Tensor mean = take(settings[0]), var = take(settings[1]), weight = take_optional(settings[2]);
  Tensor bias = take_optional(settings[3]), conv_bias = take_optional(settings[4]);
  const double eps = to<double>(settings[5]);
  NormActivation a{maps(x, out, "norm_activation"), nullptr, nullptr};
  a.activation = Activation(to<int64_t>(settings[6]));
  const int64_t C = a.maps.C;
  const float *m = per_channel(mean, C), *v = per_channel(var, C), *w = per_channel(weight, C);
  const float *b = per_channel(bias, C), *before = per_channel(conv_bias, C);
  std::vector<float> scale(C), shift(C);
  for (int64_t c = 0; c < C; ++c) {
    scale[c] = 1 / std::sqrt(v[c] + float(eps)) * (w ? w[c] : 1);
    shift[c] = ((before ? before[c] : 0) - m[c]) * scale[c] + (b ? b[c] : 0);
  }
  a.scale = scale.data(), a.shift = shift.data();
  over(a.maps, 16, [&](int64_t i, int64_t j) { current->elementwise->norm_activation(a, i, j); });
}

void norm_activation(Value* stack, uint64_t, uint64_t) {
  Tensor x = take(stack[0]);
  Tensor out = empty_as(x);
  run_norm_activation(x, out, stack + 1);
  give(stack, out);
}

void norm_activation_(Value* stack, uint64_t, uint64_t) {
  Tensor x = take(stack[0]);
  run_norm_activation(x, x, stack + 1);
}

// (Tensor x, Tensor? factor) -> Tensor; factor (B, C) or (1, C), or what picture_norm gives
void pooled_difference(Value* stack, uint64_t, uint64_t) {
  Tensor x = take(stack[0]), factor = take_optional(stack[1]);
  Tensor out = empty_as(x);
  Pooled a{maps(x, out, "pooled_difference"), nullptr, nullptr, 0, poison};
  if (factor) {
    const int64_t *n = factor.sizes(), *s = factor.strides(), axes = factor.dim(), last = axes - 1;
    require(
        (axes == 2 || (axes == 3 && n[1] == kPlanes)) && (n[0] == a.maps.B || n[0] == 1) && n[last] == a.maps.C &&
            (s[last] == 1 || n[last] == 1) && factor.dtype() == float32(),
        "pooled_difference", "the factors do not fit");
    a.factor = static_cast<const float*>(factor.data()), a.next = n[0] == 1 ? 0 : s[0];
    if (axes == 3) a.centre = a.factor + s[1];
  }
  over(a.maps, 8, [&](int64_t i, int64_t j) { current->elementwise->pooled_difference(a, i, j); });
  give(stack, out);
}

// (Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor (B, 3, C): factors, the mean, what is added then
void picture_norm(Value* stack, uint64_t, uint64_t) {
  Tensor x = take(stack[0]), weight = take_optional(stack[1]), bias = take_optional(stack[2]);
  const double eps = to<double>(stack[3]);
  const Maps m = maps(x, x, "picture_norm");
  const int64_t C = m.C, count = C * m.H * m.W;
  require(count > 0, "picture_norm", "an axis is empty");
  const float *w = per_channel(weight, C), *b = per_channel(bias, C);
  Tensor out = empty({m.B, kPlanes, C}, x.dtype());
  auto* to = static_cast<float*>(out.data());
  const double flops = 4.0 * double(count);
  auto each = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double mean, variance;
      current->elementwise->moments(m.in + i * count, count, &mean, &variance);
      const double scale = 1 / std::sqrt(variance + eps);
      // What the mean loses when it is rounded, multiplied like the rest, is in what is added.
      const float rounded = float(mean);
      const double rest = mean - double(rounded);
      float *factor = to + i * kPlanes * C, *centre = factor + C, *shift = centre + C;
      for (int64_t c = 0; c < C; ++c) {
        const double f = scale * (w ? w[c] : 1);
        factor[c] = float(f), centre[c] = rounded, shift[c] = float((b ? b[c] : 0) - rest * f);
      }
    }
  };
  if (m.B) parallel(m.B, grain(flops), each);
  give(stack, out);
}

}  // namespace
}  // namespace mvk
