// The ops of inference for runtimes without strides. Included by the files that register them there alone, after their host.
//
// A map is a tensor of four axes, (B, C, H, W) or (B, H, W, C), and numbers say which of its channels the op reads: several maps can
// lie in one tensor, as queries, keys and values do after a product. The kernels read them there. mvkernels/export/nodes.py has the
// same list of ops.
#pragma once

#include <string>

// The ops.
#include "common/linear_attention_op.h"
#include "common/mobile_former_op.h"
#include "multiscale_linear_attention/multiscale_op.h"
#include "patch_attention/patch_attention_op.h"
#include "window_attention/window_attention_op.h"

namespace mvk {
namespace {

enum class Kind {
  map,       // a tensor of four axes, and where in it a map (B, heads, dim, H, W) is
  channels,  // a tensor of four axes that is read whole, (B, C, H, W)
  tensor,    // any tensor
  optional,  // the last tensor, which may be left out
  list,      // the tensors from here on
  whole,
  number,
};

struct Parameter {
  const char* name;
  Kind kind;
};

// Where a map is in a tensor.
struct Place {
  int64_t channels_last, heads, dim, first, next_head, next;
};

struct PlacedOp {
  const char* name;
  void (*run)(Value*, uint64_t, uint64_t);
  std::vector<int64_t> (*returned)(const Place* places, const Value*);  // sizes of the result
  std::vector<Parameter> parameters;                                    // as `run` takes them
};

[[noreturn]] void refuse(const PlacedOp& op, const std::string& what) {
  throw std::invalid_argument(std::string("mvkernels: ") + op.name + ": " + what);
}

// ---- where a map is ----

constexpr int64_t kTooMany = int64_t(1) << 31;  // sums of products of two could overflow

Place place_of(const PlacedOp& op, const std::string& name, const int64_t* numbers, size_t count) {
  if (count != 6) refuse(op, name + " has not six integers");
  const bool fits = std::all_of(numbers, numbers + count, [](int64_t n) { return n >= 0 && n < kTooMany; });
  if (!fits || !numbers[1] || !numbers[2]) refuse(op, "a number of " + name + " is out of range");
  return {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]};
}

// Sizes and strides of a tensor of four axes as (B, C, H, W).
struct Channels {
  int64_t sizes[4], strides[4];
};
Channels channels(const PlacedOp& op, const Tensor& t, bool last) {
  if (t.dim() != 4) refuse(op, "a map is not a tensor of four axes");
  const int64_t *n = t.sizes(), *s = t.strides();
  if (last) return {{n[0], n[3], n[1], n[2]}, {s[0], s[3], s[1], s[2]}};
  return {{n[0], n[1], n[2], n[3]}, {s[0], s[1], s[2], s[3]}};
}

Tensor map_in(const PlacedOp& op, const Tensor& t, const Place& place) {
  const Channels c = channels(op, t, place.channels_last);
  const int64_t last = place.first + (place.heads - 1) * place.next_head + (place.dim - 1) * place.next;
  if (last >= c.sizes[1]) refuse(op, "a map has channels that its tensor has not");
  const int64_t sizes[] = {c.sizes[0], place.heads, place.dim, c.sizes[2], c.sizes[3]};
  const int64_t strides[] = {
      c.strides[0], place.next_head * c.strides[1], place.next * c.strides[1], c.strides[2], c.strides[3]};
  return Tensor(static_cast<float*>(t.data()) + place.first * c.strides[1], sizes, strides, 5, t.dtype());
}

Tensor channels_in(const PlacedOp& op, const Tensor& t, const Place& place) {
  const Channels c = channels(op, t, place.channels_last);
  return Tensor(t.data(), c.sizes, c.strides, 4, t.dtype());
}

// The tensor as the op reads it, of an argument of this kind.
Tensor placed(const PlacedOp& op, Kind kind, Tensor given, const Place& place) {
  if (kind == Kind::map) return map_in(op, given, place);
  if (kind == Kind::channels) return channels_in(op, given, place);
  return given;
}

// ---- sizes of results ----

// A map of `dim` wide heads, laid out as the map that is parameter `like`: channels last if its dims are side by side.
std::vector<int64_t> as_map(const Place* places, const Value* stack, size_t like, int64_t dim) {
  const int64_t* n = stack[like].tensor->sizes();
  const Place& place = places[like];
  if (place.channels_last && place.next == 1) return {n[0], n[3], n[4], n[1] * dim};
  return {n[0], n[1] * dim, n[3], n[4]};
}
std::vector<int64_t> as_query(const Place* places, const Value* stack) {
  return as_map(places, stack, 0, stack[2].tensor->sizes()[2]);
}
std::vector<int64_t> as_first_map(const Place* places, const Value* stack) {
  return as_map(places, stack, 0, stack[0].tensor->sizes()[2]);
}
std::vector<int64_t> as_tokens(const Place*, const Value* stack) {
  const Tensor& tokens = *stack[0].tensor;
  return {tokens.sizes(), tokens.sizes() + tokens.dim()};
}
// Of each scale a third of the channels.
std::vector<int64_t> as_scales(const Place* places, const Value* stack) {
  const int64_t* n = stack[0].tensor->sizes();
  const auto scales =
      std::count_if(stack[1].list->begin(), stack[1].list->end(), [](const Tensor& t) { return t.dim() == 4; });
  const int64_t channels = n[1] / 3 * (1 + scales / 2);
  if (places[0].channels_last) return {n[0], n[2], n[3], channels};
  return {n[0], channels, n[2], n[3]};
}

const std::vector<PlacedOp>& placed_ops() {
  using enum Kind;
  static const std::vector<PlacedOp> all = {
      {"patch_attention",
       patch_attention_forward,
       as_query,
       {{"query", map},
        {"key", map},
        {"value", map},
        {"patch_height", whole},
        {"patch_width", whole},
        {"bias", optional},
        {"scale", number}}},
      {"window_attention",
       window_attention_forward,
       as_query,
       {{"query", map},
        {"key", map},
        {"value", map},
        {"window_height", whole},
        {"window_width", whole},
        {"shift_y", whole},
        {"shift_x", whole},
        {"bias", optional},
        {"scale", number}}},
      {"relu_linear_attention",
       relu_linear_attention_forward<false>,
       as_query,
       {{"query", map}, {"key", map}, {"value", map}, {"eps", number}}},
      {"multiscale_linear_attention",
       multiscale_linear_attention_forward<false>,
       as_scales,
       {{"qkv", channels}, {"weights", list}, {"head_dim", whole}, {"eps", number}}},
      {"mobile_to_former", mobile_to_former_forward, as_tokens, {{"query", tensor}, {"x", map}, {"scale", number}}},
      {"former_to_mobile",
       former_to_mobile_forward,
       as_first_map,
       {{"x", map}, {"key", tensor}, {"value", tensor}, {"scale", number}, {"residual", whole}}},
  };
  return all;
}

}  // namespace
}  // namespace mvk

#define MVK_EXPORT extern "C" __attribute__((visibility("default")))

// For tests: take another instruction set, 0 if it is not there; fill fresh buffers with NaN.
MVK_EXPORT int mvkernels_set_instruction_set(const char* name) {
  const mvk::InstructionSet* set = mvk::find(name);
  if (set) mvk::current = set;
  return set != nullptr;
}
MVK_EXPORT void mvkernels_set_poison(int on) { mvk::poison = on; }
