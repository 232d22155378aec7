// ReLU linear attention as boxed operators. Included by the files that register them alone.
#pragma once

#include "common/tensor.h"
#include "instruction_sets.h"

namespace mvk {
namespace {

// Runs a kernel over all units: in one go, or in two stages with the sums of each chunk in between.
template <class Kernel>
void in_stages(LinearAttention& a, Kernel kernel, double products) {
  const double flops = 2.0 * products * double(a.pixels()) * double(a.D) * double(a.D);
  a.chunks = chunks(a.B * a.heads, flops, a.pixels() / 64);
  const int64_t least = grain(flops / double(a.chunks));
  auto run = [&](Stage stage) {
    a.stage = stage;
    parallel(a.units(), least, [&](int64_t i, int64_t j) { kernel(a, i, j); });
  };
  if (a.chunks == 1) return run(Stage::all);
  Tensor partial = empty({a.units(), a.partial_size()}, sums_dtype(a.dtype));
  a.partial = partial.data();
  run(Stage::sums);
  run(Stage::rest);
}

// Sums that the forward left: contiguous, in the type of sums.
void require_sums(const char* op, const Tensor& t, const std::vector<int64_t>& sizes, DType dtype) {
  bool fits = t.dim() == int64_t(sizes.size()) && t.dtype() == sums_dtype(dtype);
  for (int64_t i = t.dim() - 1, step = 1; fits && i >= 0; step *= sizes[i--])
    fits = t.sizes()[i] == sizes[i] && (sizes[i] == 1 || t.strides()[i] == step);
  require(fits, op, "the sums do not fit");
}

// What forward and backward have in common; checks again what indexing relies on, for callers of the raw operators.
LinearAttention describe(const Tensor& query, const Tensor& key, const Tensor& value, double eps) {
  require(query.dim() == 5 && key.dim() == 5 && value.dim() == 5, "relu_linear_attention", "maps have 5 axes");
  require(
      same_sizes(query, key, {0, 1, 2, 3, 4}) && same_sizes(query, value, {0, 1, 2, 3, 4}), "relu_linear_attention",
      "query, key and value do not fit");
  require(query.dtype() == key.dtype() && query.dtype() == value.dtype(), "relu_linear_attention", "mixed dtypes");
  LinearAttention a{};
  a.dtype = dtype_of(query, "relu_linear_attention");
  const int64_t* n = query.sizes();
  require_sizes("relu_linear_attention", {n[1], n[3], n[4]}, {n[2]});
  a.B = n[0], a.heads = n[1], a.D = n[2], a.H = n[3], a.W = n[4], a.eps = eps, a.poison = poison;
  a.query = map(query), a.key = map(key), a.value = map(value);
  return a;
}

// With `kept`, also what the backward needs of it.
template <bool kept>
void relu_linear_attention_forward(Value* stack, uint64_t, uint64_t) {
  Tensor query = take(stack[0]), key = take(stack[1]), value = take(stack[2]);
  LinearAttention a = describe(query, key, value, to<double>(stack[3]));
  Tensor out = result_map(query, a.D), kv, keys;
  a.out = map(out);
  if constexpr (kept) {
    kv = empty({a.B, a.heads, a.D, a.D}, sums_dtype(a.dtype));
    keys = empty({a.B, a.heads, a.D}, sums_dtype(a.dtype));
    a.kv = kv.data(), a.keys = keys.data();
  }
  if (a.B) in_stages(a, current->relu_linear_attention->forward, 2);
  give(stack, out);
  if constexpr (kept) {
    give(stack + 1, kv);
    give(stack + 2, keys);
  }
}

void relu_linear_attention_backward(Value* stack, uint64_t, uint64_t) {
  Tensor grad = take(stack[0]), query = take(stack[1]), key = take(stack[2]), value = take(stack[3]);
  Tensor kv = take(stack[4]), keys = take(stack[5]);
  LinearAttention a = describe(query, key, value, to<double>(stack[6]));
  require(
      grad.dim() == 5 && same_sizes(grad, query, {0, 1, 2, 3, 4}) && grad.dtype() == query.dtype(),
      "relu_linear_attention", "grad does not fit");
  require_sums("relu_linear_attention", kv, {a.B, a.heads, a.D, a.D}, a.dtype);
  require_sums("relu_linear_attention", keys, {a.B, a.heads, a.D}, a.dtype);
  Tensor dquery = empty_map(query, a.D), dkey = empty_map(key, a.D), dvalue = empty_map(value, a.D);
  a.grad = map(grad), a.dquery = map(dquery), a.dkey = map(dkey), a.dvalue = map(dvalue);
  a.kv = kv.data(), a.keys = keys.data();
  if (a.B) in_stages(a, current->relu_linear_attention->backward, 4);
  give(stack, dquery);
  give(stack + 1, dkey);
  give(stack + 2, dvalue);
}

}  // namespace
}  // namespace mvk
