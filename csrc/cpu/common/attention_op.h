// Forward and backward of the ops of attention inside groups of pixels, for tensors. Included by the files that register ops alone.
#pragma once

#include "common/in_rows_op.h"

namespace mvk {
namespace {

// What forward and backward have in common; checks again what indexing relies on, for callers of the raw operators. An op gives
// the groups of a query map and a key map of these sizes.
template <class GroupsOf>
Attention describe(
    const char* op, const Tensor& query, const Tensor& key, const Tensor& value, const GroupsOf& groups_of,
    const Tensor& bias, double scale) {
  require(query.dim() == 5 && key.dim() == 5 && value.dim() == 5, op, "maps have 5 axes");
  require(
      same_sizes(query, key, {0, 1, 2}) && same_sizes(query, value, {0, 1}) && same_sizes(key, value, {3, 4}), op,
      "query, key and value do not fit");
  require(query.dtype() == key.dtype() && query.dtype() == value.dtype(), op, "mixed dtypes");
  const int64_t *n = query.sizes(), *m = key.sizes();
  require_sizes(op, {n[1], n[3], n[4], m[3], m[4]}, {n[2], value.sizes()[2]});
  Attention a{};
  static_cast<Groups&>(a) = groups_of(n[3], n[4], m[3], m[4]);
  a.dtype = dtype_of(query, op);
  a.B = n[0], a.heads = n[1], a.D = n[2], a.Dv = value.sizes()[2], a.scale = scale;
  a.query = map(query), a.key = map(key), a.value = map(value);
  a.poison = poison;
  if (bias) {
    const int64_t *size = bias.sizes(), *stride = bias.strides();
    require(
        bias.dim() == 3 && bias.dtype() == query.dtype() && size[0] == a.heads && size[1] == a.places() &&
            size[2] == a.key_places(),
        op, "bias does not fit");
    a.clipped = !(a.y.equal() && a.x.equal());
    require(!a.clipped || a.y.window, op, "bias needs equal groups");
    a.bias = bias.data();
    a.bias_dtype = a.dtype;
    std::copy(stride, stride + 3, a.bias_stride);
  }
  return a;
}

// FLOPs of one (slice, head), at so many for each pair of a query and a key.
double flops(const Attention& a, double of_a_pair) { return double(a.tokens()) * double(a.keys()) * of_a_pair; }

Tensor attention_forward(Attention a, const Tensor& query) {
  Tensor out = result_map(query, a.Dv);
  if (!a.B) return out;
  a.out = map(out);
  const double work = flops(a, 2.0 * double(a.D + a.Dv));
  in_rows(a, {&Attention::query, &Attention::key, &Attention::value}, {&Attention::out}, false, [&](Attention part) {
    part.slices = part.B * part.groups();
    part.chunks = chunks(part.slices * part.heads, work, part.tokens() / Attention::kBlock);
    parallel(part.units(), grain(work / double(part.chunks)), [&](int64_t i, int64_t j) {
      current->attention->forward(part, i, j);
    });
  });
  return out;
}

struct AttentionGradients {
  Tensor query, key, value, bias;
};

void backward_of(Attention a) {
  const double work = flops(a, 2.0 * double(3 * a.D + 2 * a.Dv));
  a.slices = a.B * a.groups(), a.chunks = 1;
  Tensor partial;
  if (a.dbias) {
    a.slices = std::clamp<int64_t>((threads() + a.heads - 1) / a.heads, 1, a.slices);
    if (a.B * a.groups() > 1 || a.clipped) {
      partial = empty({a.slices, a.heads, a.key_places(), a.padded(a.places())}, sums_dtype(a.dtype));
      a.dbias_partial = partial.data();
    }
  } else {
    a.chunks = chunks(a.slices * a.heads, work, a.tokens() / 64);
    if (a.chunks > 1) {
      partial = empty({a.units(), a.partial_size()}, sums_dtype(a.dtype));
      a.partial = partial.data();
    }
  }
  const AttentionKernels& kernels = *current->attention;
  const int64_t least = a.dbias ? 1 : grain(work / double(a.chunks));
  parallel(a.units(), least, [&](int64_t i, int64_t j) { kernels.backward(a, i, j); });
  if (a.partial) parallel(a.slices * a.heads, 1, [&](int64_t i, int64_t j) { kernels.sum_dkeys(a, i, j); });
  if (a.dbias_partial) parallel(a.heads, 1, [&](int64_t i, int64_t j) { kernels.sum_dbias(a, i, j); });
}

AttentionGradients attention_backward(
    const char* op, Attention a, const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value,
    bool need_bias) {
  require(
      grad.dim() == 5 && same_sizes(grad, query, {0, 1, 3, 4}) && same_sizes(grad, value, {2}) &&
          grad.dtype() == query.dtype(),
      op, "grad does not fit");
  require(!need_bias || a.bias, op, "there is no bias to differentiate");
  a.grad = map(grad);
  AttentionGradients found = {empty_map(query, a.D), empty_map(key, a.D), empty_map(value, a.Dv), Tensor()};
  a.dquery = map(found.query), a.dkey = map(found.key), a.dvalue = map(found.value);

  found.bias = need_bias ? empty({a.heads, a.places(), a.key_places()}, query.dtype()) : empty({0}, query.dtype());
  if (need_bias) a.dbias = found.bias.data();
  if (need_bias && !a.B)
    std::memset(a.dbias, 0, size_t(a.heads * a.places() * a.key_places()) * item_size(query.dtype()));
  // The gradient of a bias is a sum over the whole batch.
  if (a.B)
    in_rows(
        a, {&Attention::query, &Attention::key, &Attention::value, &Attention::grad},
        {&Attention::dquery, &Attention::dkey, &Attention::dvalue}, need_bias, backward_of);
  return found;
}

// The boxed operators of an op: tensors, then `count` numbers that say what a group is, then the bias, the scale and, for
// the backward, whether the bias's gradient is wanted. `groups(op, numbers)` makes what describe() asks for the groups.
template <int count, class GroupsOf>
Attention described(const char* op, Value* stack, const Tensor maps[3], const GroupsOf& groups) {
  int64_t numbers[count];
  for (int i = 0; i < count; ++i) numbers[i] = to<int64_t>(stack[i]);
  const Tensor bias = take_optional(stack[count]);
  return describe(op, maps[0], maps[1], maps[2], groups(op, numbers), bias, to<double>(stack[count + 1]));
}

template <int count, class GroupsOf>
void boxed_forward(const char* op, Value* stack, const GroupsOf& groups) {
  const Tensor maps[] = {take(stack[0]), take(stack[1]), take(stack[2])};
  Tensor out = attention_forward(described<count>(op, stack + 3, maps, groups), maps[0]);
  give(stack, out);
}

template <int count, class GroupsOf>
void boxed_backward(const char* op, Value* stack, const GroupsOf& groups) {
  const Tensor grad = take(stack[0]), maps[] = {take(stack[1]), take(stack[2]), take(stack[3])};
  const bool need_bias = to<bool>(stack[count + 6]);
  const Attention a = described<count>(op, stack + 4, maps, groups);
  AttentionGradients found = attention_backward(op, a, grad, maps[0], maps[1], maps[2], need_bias);
  give(stack, found.query);
  give(stack + 1, found.key);
  give(stack + 2, found.value);
  give(stack + 3, found.bias);
}

}  // namespace
}  // namespace mvk
