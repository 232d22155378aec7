// Mobile-Former's two bridges as boxed operators. Included by the files that register them alone.
#pragma once

#include "common/tensor.h"
#include "instruction_sets.h"

namespace mvk {
namespace {

Tokens tokens(const Tensor& t) {
  const int64_t* s = t.strides();
  return {t.data(), s[0], s[1], s[2], s[3]};
}

// What all four have in common; checks again what indexing relies on, for callers of the raw operators.
Bridge describe(const char* op, const Tensor& x, const Tensor& some_tokens, double scale) {
  require(x.dim() == 5 && some_tokens.dim() == 4, op, "a map has 5 axes, tokens have 4");
  const int64_t *n = x.sizes(), *m = some_tokens.sizes();
  require(m[0] == n[0] && m[1] == n[1] && m[3] == n[2], op, "tokens and map do not fit");
  require_sizes(op, {n[1], n[3], n[4], m[2]}, {n[2]});
  require(x.dtype() == some_tokens.dtype(), op, "mixed dtypes");
  Bridge a{};
  a.dtype = dtype_of(x, op);
  a.B = n[0], a.heads = n[1], a.D = n[2], a.H = n[3], a.W = n[4], a.M = m[2];
  a.scale = scale, a.x = map(x), a.chunks = 1, a.poison = poison;
  return a;
}

void require_like(const Tensor& t, const Tensor& like, const char* op, const char* what) {
  require(t.dim() == like.dim() && t.dtype() == like.dtype(), op, what);
  require(std::equal(t.sizes(), t.sizes() + t.dim(), like.sizes()), op, what);
}

// Splits the work over threads: sets a.chunks, and returns the fewest units that a thread should get. `products` is how many
// times each pixel meets each token.
int64_t split(Bridge& a, double products) {
  const double flops = 2.0 * products * double(a.pixels()) * double(a.M) * double(a.D);
  a.chunks = chunks(a.B * a.heads, flops, a.pixels() / 64);
  return grain(flops / double(a.chunks));
}

// Room for the partial sums of all units, so many numbers each, if there are any: where units are chunks of a head.
Tensor partial_sums(Bridge& a, int64_t size) {
  Tensor partial;
  if (a.chunks > 1) {
    partial = empty({a.units(), size}, sums_dtype(a.dtype));
    a.partial = partial.data();
  }
  return partial;
}

void mobile_to_former_forward(Value* stack, uint64_t, uint64_t) {
  Tensor query = take(stack[0]), x = take(stack[1]);
  Bridge a = describe("mobile_to_former", x, query, to<double>(stack[2]));
  Tensor out = result(dense({a.B, a.heads, a.M, a.D}), query.dtype());
  if (a.B) {
    a.query = tokens(query), a.out = tokens(out);
    const int64_t least = split(a, 2);
    const Tensor partial = partial_sums(a, a.forward_partial());
    const MobileToFormerKernels& kernels = *current->mobile_to_former;
    parallel(a.units(), least, [&](int64_t i, int64_t j) { kernels.forward(a, i, j); });
    if (a.partial) kernels.merge(a, 0, a.B * a.heads);
  }
  give(stack, out);
}

void mobile_to_former_backward(Value* stack, uint64_t, uint64_t) {
  Tensor grad = take(stack[0]), query = take(stack[1]), x = take(stack[2]);
  Bridge a = describe("mobile_to_former", x, query, to<double>(stack[3]));
  require_like(grad, query, "mobile_to_former", "grad does not fit");
  Tensor dquery = empty({a.B, a.heads, a.M, a.D}, query.dtype()), dx = empty_map(x, a.D);
  if (a.B) {
    a.query = tokens(query), a.grad = tokens(grad), a.dquery = tokens(dquery), a.dx = map(dx);
    const int64_t least = split(a, 5);
    const Tensor partial = partial_sums(a, a.M * a.D + a.weights());
    const MobileToFormerKernels& kernels = *current->mobile_to_former;
    if (a.partial) parallel(a.units(), least, [&](int64_t i, int64_t j) { kernels.weights(a, i, j); });
    parallel(a.units(), least, [&](int64_t i, int64_t j) { kernels.backward(a, i, j); });
    if (a.partial) kernels.sum_dquery(a, 0, a.B * a.heads);
  }
  give(stack, dquery);
  give(stack + 1, dx);
}

void former_to_mobile_forward(Value* stack, uint64_t, uint64_t) {
  Tensor x = take(stack[0]), key = take(stack[1]), value = take(stack[2]);
  Bridge a = describe("former_to_mobile", x, key, to<double>(stack[3]));
  require_like(value, key, "former_to_mobile", "value does not fit");
  a.residual = to<bool>(stack[4]);
  Tensor out = result_map(x, a.D);
  if (a.B) {
    a.key = tokens(key), a.value = tokens(value), a.out_map = map(out);
    const int64_t least = split(a, 2);
    parallel(a.units(), least, [&](int64_t i, int64_t j) { current->former_to_mobile->forward(a, i, j); });
  }
  give(stack, out);
}

void former_to_mobile_backward(Value* stack, uint64_t, uint64_t) {
  Tensor grad = take(stack[0]), x = take(stack[1]), key = take(stack[2]), value = take(stack[3]);
  Bridge a = describe("former_to_mobile", x, key, to<double>(stack[4]));
  require_like(value, key, "former_to_mobile", "value does not fit");
  require_like(grad, x, "former_to_mobile", "grad does not fit");
  a.residual = to<bool>(stack[5]);
  Tensor dx = empty_map(x, a.D), dkey = empty({a.B, a.heads, a.M, a.D}, key.dtype());
  Tensor dvalue = empty({a.B, a.heads, a.M, a.D}, key.dtype());
  if (a.B) {
    a.key = tokens(key), a.value = tokens(value), a.dkey = tokens(dkey), a.dvalue = tokens(dvalue);
    a.grad_map = map(grad), a.dx = map(dx);
    const int64_t least = split(a, 5);
    const Tensor partial = partial_sums(a, a.backward_partial());
    const FormerToMobileKernels& kernels = *current->former_to_mobile;
    parallel(a.units(), least, [&](int64_t i, int64_t j) { kernels.backward(a, i, j); });
    if (a.partial) kernels.sum_dtokens(a, 0, a.B * a.heads);
  }
  give(stack, dx);
  give(stack + 1, dkey);
  give(stack + 2, dvalue);
}

}  // namespace
}  // namespace mvk
