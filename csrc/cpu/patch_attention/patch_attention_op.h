// Patch attention as boxed torch operators. Included by register.cpp alone.
#pragma once

#include "common/tensor.h"
#include "instruction_sets.h"

namespace mvk {
namespace {

// A patch as large as the map or larger makes every pixel its own group; sums with more than this could overflow.
constexpr int64_t kLargest = (int64_t(1) << 31) - 1;

// What forward and backward have in common; checks again what indexing relies on, for callers of the raw operator.
PatchAttention describe(
    const Tensor& query, const Tensor& key, const Tensor& value, int64_t ph, int64_t pw, const Tensor& bias,
    double scale) {
  require(query.dim() == 5 && key.dim() == 5 && value.dim() == 5, "patch_attention", "maps have 5 axes");
  require(
      same_sizes(query, key, {0, 1, 2, 3, 4}) && same_sizes(query, value, {0, 1, 3, 4}), "patch_attention",
      "query, key and value do not fit");
  require(query.dtype() == key.dtype() && query.dtype() == value.dtype(), "patch_attention", "mixed dtypes");
  require(ph >= 1 && pw >= 1, "patch_attention", "patch_size is less than 1");
  const int64_t* n = query.sizes();
  require_sizes("patch_attention", {n[1], n[3], n[4]}, {n[2], value.sizes()[2]});
  PatchAttention a{};
  a.dtype = dtype_of(query, "patch_attention");
  a.B = n[0], a.heads = n[1], a.D = n[2], a.H = n[3], a.W = n[4], a.Dv = value.sizes()[2];
  a.ph = std::min(ph, kLargest), a.pw = std::min(pw, kLargest), a.scale = scale;
  a.query = map(query), a.key = map(key), a.value = map(value);
  a.poison = poison;
  if (bias) {
    const int64_t *m = bias.sizes(), *s = bias.strides();
    require(
        bias.dim() == 3 && bias.dtype() == query.dtype() && m[0] == a.heads && m[1] == a.tokens() &&
            m[2] == a.tokens() && a.H % ph == 0 && a.W % pw == 0,
        "patch_attention", "bias does not fit");
    a.bias = bias.data();
    std::copy(s, s + 3, a.bias_stride);
  }
  a.slices = a.B * a.groups();
  a.chunks = 1;
  return a;
}

// FLOPs of one (slice, head), at so many for each pair of a query and a key.
double flops(const PatchAttention& a, double of_a_pair) { return double(a.tokens()) * double(a.tokens()) * of_a_pair; }

void patch_attention_forward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor query = take(stack[0]), key = take(stack[1]), value = take(stack[2]), bias = take_optional(stack[5]);
  PatchAttention a = describe(
      query, key, value, torch::stable::detail::to<int64_t>(stack[3]), torch::stable::detail::to<int64_t>(stack[4]),
      bias, torch::stable::detail::to<double>(stack[6]));
  Tensor out = empty_map(query, a.Dv);
  if (a.B) {
    a.out = map(out);
    const double pair = 2.0 * double(a.D + a.Dv);
    a.chunks = chunks(a.slices * a.heads, flops(a, pair), a.tokens() / PatchAttention::kBlock);
    parallel(a.units(), grain(flops(a, pair) / double(a.chunks)), [&](int64_t i, int64_t j) {
      current->patch_attention->forward(a, i, j);
    });
  }
  give(stack, out);
}

void patch_attention_backward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor grad = take(stack[0]), query = take(stack[1]), key = take(stack[2]), value = take(stack[3]);
  Tensor bias = take_optional(stack[6]);
  const bool need_bias = torch::stable::detail::to<bool>(stack[8]);
  PatchAttention a = describe(
      query, key, value, torch::stable::detail::to<int64_t>(stack[4]), torch::stable::detail::to<int64_t>(stack[5]),
      bias, torch::stable::detail::to<double>(stack[7]));
  require(
      grad.dim() == 5 && same_sizes(grad, value, {0, 1, 2, 3, 4}) && grad.dtype() == query.dtype(), "patch_attention",
      "grad does not fit");
  require(!need_bias || bias, "patch_attention", "there is no bias to differentiate");
  a.grad = map(grad);
  Tensor dquery = empty_map(query, a.D), dkey = empty_map(key, a.D), dvalue = empty_map(value, a.Dv);
  a.dquery = map(dquery), a.dkey = map(dkey), a.dvalue = map(dvalue);

  const int64_t N = a.tokens();
  const double pair = 2.0 * double(3 * a.D + 2 * a.Dv);
  Tensor dbias = need_bias ? empty({a.heads, N, N}, query.dtype()) : empty({0}, query.dtype());
  Tensor partial;
  if (need_bias) {
    a.slices = std::clamp<int64_t>((threads() + a.heads - 1) / a.heads, 1, std::max<int64_t>(a.slices, 1));
    a.dbias = dbias.data();
    if (a.B * a.groups() > 1) {
      partial = empty({a.slices, a.heads, N, a.padded()}, sums_dtype(a.dtype));
      a.dbias_partial = partial.data();
    } else if (!a.B) {
      std::memset(a.dbias, 0, size_t(a.heads * N * N) * item_size(query.dtype()));
    }
  } else {
    a.chunks = chunks(a.slices * a.heads, flops(a, pair), N / 64);
    if (a.chunks > 1) {
      partial = empty({a.units(), a.partial_size()}, sums_dtype(a.dtype));
      a.partial = partial.data();
    }
  }
  if (a.B) {
    const PatchAttentionKernels& kernels = *current->patch_attention;
    const int64_t least = need_bias ? 1 : grain(flops(a, pair) / double(a.chunks));
    parallel(a.units(), least, [&](int64_t i, int64_t j) { kernels.backward(a, i, j); });
    if (a.partial) parallel(a.slices * a.heads, 1, [&](int64_t i, int64_t j) { kernels.sum_dkeys(a, i, j); });
    if (a.dbias_partial) parallel(a.heads, 1, [&](int64_t i, int64_t j) { kernels.sum_dbias(a, i, j); });
  }
  give(stack, dquery);
  give(stack + 1, dkey);
  give(stack + 2, dvalue);
  give(stack + 3, dbias);
}

}  // namespace
}  // namespace mvk
